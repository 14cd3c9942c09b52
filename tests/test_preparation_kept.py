"""A data folder once it is there: found again, checked, repaired; and a preparation cut short."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import contents, error_of, make, some_texts, word_config, write_jsonl

from tinylm.data import encode as encode_module
from tinylm.data import open_dataset, prepare
from tinylm.data.overlap import measure_overlap


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "corpus.jsonl", [*some_texts(), "", " \n\u2028"])


# --- cache -------------------------------------------------------------------------------------


def test_second_run_only_opens(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = word_config(corpus)
    first = make(config, tmp_path)
    before = contents(first.path)

    def refuse(*args: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("tinylm.data.folder.DataFolder.stage", refuse)
    second = make(config, tmp_path)
    assert second.path == first.path
    assert contents(second.path) == before
    moved = write_jsonl(tmp_path / "moved.jsonl", [*some_texts(), "", " \n\u2028"])
    assert make(word_config(moved), tmp_path).path == first.path
    write_jsonl(Path(corpus), some_texts(seed=1))
    with pytest.raises(AssertionError, match="made again"):
        make(config, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 21}, {"valid_fraction": 0.1}, {"document_eos": False}, {"errors": "replace"}],
)
def test_settings_have_their_own_folders(
    corpus: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    plain, changed = (make(word_config(corpus, **c), tmp_path) for c in ({}, change))
    assert plain.path != changed.path
    assert plain.meta["files"] != changed.meta["files"]


def test_default_cache_dir(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TINYLM_CACHE", raising=False)
    data = prepare(word_config(corpus), progress=False)
    assert data.path.parent == tmp_path / "xdg" / "tinylm" / "data"
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "own"))
    assert prepare(word_config(corpus), progress=False).path.parent == tmp_path / "own" / "data"


def test_out_folder(corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = make(word_config(corpus), tmp_path / "cache", out=out)
    assert data.path == out
    before = contents(out)
    assert before == contents(make(word_config(corpus), tmp_path / "cache").path)
    make(word_config(corpus), tmp_path / "cache", out=out)
    other = word_config(corpus, vocab_size=21)
    message = error_of(lambda: make(other, tmp_path / "cache", out=out))
    assert "another configuration" in message
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    message = error_of(lambda: make(other, tmp_path / "cache", out=tmp_path / "mine"))
    assert "thesis.doc" in message
    assert contents(tmp_path / "mine") == {"thesis.doc": b"precious"}
    assert "is a file" in error_of(lambda: make(other, tmp_path / "cache", out=Path(corpus)))


# --- damage ------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("train.bin", "valid.docs", "tokenizer.json", "spelling.safetensors")
        for damage in (truncate, flip, Path.unlink)
    ]
    # meta.json has no checksum, only its syntax.
    + [("meta.json", truncate), ("meta.json", Path.unlink)],
)
def test_damage_is_told_and_repaired(
    corpus: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    data = make(word_config(corpus), tmp_path / "cache")
    path, whole = data.path, contents(data.path)
    del data
    damage(path / name)
    message = error_of(lambda: open_dataset(path))
    assert name in message
    assert "prepare" in message
    capsys.readouterr()
    make(word_config(corpus), tmp_path / "cache")
    assert contents(path) == whole
    said = capsys.readouterr().err
    if name != "meta.json" or damage is not Path.unlink:
        assert said.count("\n") == 1
        assert name in said


def test_open_dataset_without_data(tmp_path: Path) -> None:
    assert "no meta.json" in error_of(lambda: open_dataset(tmp_path))
    assert "no meta.json" in error_of(lambda: open_dataset(tmp_path / "missing"))


def test_full_disk(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encode_module.SplitWriter, "_write", full)
        message = error_of(lambda: make(word_config(corpus), tmp_path / "a", out=tmp_path / "out"))
    assert "the disk is full" in message
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".lock", "spelling.safetensors", "stages.json", "tokenizer.json"]
    whole = make(word_config(corpus), tmp_path / "b")
    again = make(word_config(corpus), tmp_path / "a", out=tmp_path / "out")
    assert contents(again.path) == contents(whole.path)


def test_source_that_changes_meanwhile(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(*args: Any) -> Any:
        with open(corpus, "a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
        return measure_overlap(*args)

    monkeypatch.setattr(sys.modules["tinylm.data.preparation"], "measure_overlap", grow)
    out = tmp_path / "out"
    message = error_of(lambda: make(word_config(corpus), tmp_path / "cache", out=out))
    assert "changed while it was read" in message
    assert contents(out) == {".lock": b""}


# --- kills and other runs ----------------------------------------------------------------------

# Prepares argv[1] into argv[2]; dies by SIGKILL before or after the nth rename or deletion.
KILLED = """
import os, signal, sys
corpus, out, nth, when = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
from tinylm.data import DataConfig, prepare
done = 0
def deadly(real):
    def call(*args, **kwargs):
        global done
        done += 1
        if done == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)
        if done == nth:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
os.replace, os.unlink = deadly(os.replace), deadly(os.unlink)
prepare(DataConfig(data=corpus, tokenizer="word", vocab_size=20), cache_dir=out + ".cache",
        out=out, progress=False)
"""


def run_killed(corpus: str, out: Path, nth: int, when: str) -> int:
    command = [sys.executable, "-c", KILLED, corpus, str(out), str(nth), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_at_any_moment_changes_nothing(corpus: str, tmp_path: Path) -> None:
    whole = contents(make(word_config(corpus), tmp_path / "whole").path)
    killed = 0
    for nth in range(1, 40):
        out = tmp_path / str(nth)
        if run_killed(corpus, out, nth, ("before", "after")[nth % 2]) == 0:
            break
        killed += 1
        assert contents(make(word_config(corpus), tmp_path / "c", out=out).path) == whole
    assert 10 <= killed < 30


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_finished_stages_are_kept(corpus: str, tmp_path: Path) -> None:
    whole = contents(make(word_config(corpus), tmp_path / "whole").path)
    out = tmp_path / "out"
    # Each run lives too short for all the work, and long enough for one more stage.
    assert run_killed(corpus, out, 8, "before") == -9
    tokenizer = (out / "tokenizer.json").stat().st_ino
    runs = 1
    while run_killed(corpus, out, 8, "before") == -9:
        runs += 1
        assert runs < 6
    assert runs > 1
    assert (out / "tokenizer.json").stat().st_ino == tokenizer
    assert contents(out) == whole


def test_runs_at_the_same_time(corpus: str, tmp_path: Path) -> None:
    whole = contents(make(word_config(corpus), tmp_path / "whole").path)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, corpus, str(out), "-1", "never"]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for run in runs:
        _, said = run.communicate(timeout=60)
        assert run.returncode == 0, said
    assert contents(out) == whole
