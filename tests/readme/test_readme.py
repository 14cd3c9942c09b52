"""Runs the README: every shell command and every line of Python in it works as written.

Training is cut to a few steps, and what needs the network or a new environment is only parsed.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.cli import build_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[list[str]]:
    """Every ``tinylm …`` line of the shell blocks, continuation lines joined."""
    text = "".join(body for language, body in BLOCKS if language == "bash")
    lines = text.replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tinylm ")]


def short(command: list[str]) -> list[str]:
    """A training command with its length cut to a few steps of a small model."""
    if command[0] != "train":
        return command
    kept = list(command)
    for option in ("--minutes", "--epochs", "--steps"):
        if option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    return [*kept, "--steps", "3", "--batch-size", "2", "--eval-tokens", "512", "--eval-every", "3"]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command: list[str]) -> None:
    build_parser().parse_args(command)


def test_commands_and_python_run_in_order(tmp_path: Path) -> None:
    """On a copy of a real beginner's folder: some text, nothing else."""
    sentences = [f"The {w} went to the {v} and came back." for w in "abcdefgh" for v in "ijklmnop"]
    (tmp_path / "my.txt").write_text("\n\n".join(sentences * 20), encoding="utf-8")
    ran = 0
    for command in commands():
        if "--resume" in command or "chat" in command or "pile" in " ".join(command):
            continue  # needs a stopped run, a person, the network
        done = subprocess.run(
            [sys.executable, "-m", "tinylm", *short(command)],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"tinylm {' '.join(command)}\n{done.stderr}"
        ran += 1
    assert ran >= 6
    python = "\n".join(body for language, body in BLOCKS if language == "python")
    assert "tinylm.load(" in python
    code = python.replace("minutes=1", "steps=3, batch_size=2, eval_tokens=512, eval_every=3")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "".join(b for lang, b in BLOCKS if lang == "bash"), re.M)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_all_commands_of_the_command_line_are_shown() -> None:
    for verb in re.findall(r"^    (\w+) ", build_parser().format_help(), re.M):
        assert f"tinylm {verb}" in README, verb
