"""The record of a run: readable at any moment, seamless after a resume, and its drawings."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm import metrics as metrics_module
from tinylm.metrics import MetricsFile, plot_loss, plot_runs, write_samples
from tinylm.progress import duration

PNG = b"\x89PNG"


def make(path: Path, *records: dict[str, object]) -> MetricsFile:
    metrics = MetricsFile(path)
    for record in records:
        metrics.append({"tokens": 10, "elapsed": 1.0, **record})
    return metrics


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    metrics = make(tmp_path / "m.jsonl", {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    with open(metrics.path, "a") as file:
        file.write('{"step": 3, "lo')
    assert [r["step"] for r in metrics.records()] == [1, 2]
    metrics.drop_after(1)
    metrics.append({"step": 2})
    assert [r["step"] for r in metrics.records()] == [1, 2]
    assert list(MetricsFile(tmp_path / "none.jsonl").records()) == []


def test_damaged_lines_cost_only_themselves(tmp_path: Path) -> None:
    """Whatever bit of the file is another one, the run can go on, and be drawn."""
    metrics = make(
        tmp_path / "m.jsonl",
        {"step": 0, "valid_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "samples": ["a b"]},
    )  # fmt: skip
    whole = metrics.path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 4, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            metrics.path.write_bytes(damaged)
            assert len(list(metrics.records())) >= 1
            metrics.drop_after(10**9)
            write_samples(metrics, tmp_path / "samples.txt")
            for x in ("tokens", "elapsed"):
                metrics_module._points(list(metrics.records()), x, "loss")


def test_samples_stand_under_their_step(tmp_path: Path) -> None:
    metrics = make(tmp_path / "m.jsonl", {"step": 5, "samples": ["ä b", " c "]}, {"step": 6})
    write_samples(metrics, tmp_path / "samples.txt")
    assert (tmp_path / "samples.txt").read_text(
        encoding="utf-8"
    ) == "=== step 5 ===\n\nä b\n\nc\n\n"


def test_plots_are_drawn_even_of_little(tmp_path: Path) -> None:
    full = make(
        tmp_path / "a.jsonl",
        {"step": 0, "valid_loss": 9.0, "valid_leaked_loss": 9.0},
        *({"step": i, "tokens": 1000 * i, "loss": 9.0 / i} for i in range(1, 80)),
        {"step": 80, "valid_loss": 2.0, "valid_leaked_loss": 1.0},
    )
    empty = make(tmp_path / "b.jsonl")
    for name, metrics in (("full", full), ("empty", empty)):
        plot_loss(metrics, tmp_path / f"{name}.png", name)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    plot_runs({"a": full, "b": empty}, tmp_path / "runs.png", "two")
    assert (tmp_path / "runs.png").read_bytes().startswith(PNG)


def test_durations() -> None:
    assert [duration(s) for s in (-1, 0, 59.4, 61, 3723)] == [
        "0 s",
        "0 s",
        "59 s",
        "1:01",
        "1:02:03",
    ]


def test_a_record_is_there_at_once_and_whole(tmp_path: Path) -> None:
    """Another process reads all the while: only whole records, in order, none of them late."""
    path, records = tmp_path / "m.jsonl", 400
    code = (
        "import sys, time; from tinylm.metrics import MetricsFile; m = MetricsFile(sys.argv[1])\n"
        "seen = 0\n"
        f"while seen < {records}:\n"
        "    steps = [r['step'] for r in m.records()]\n"
        "    assert steps == list(range(len(steps))) and len(steps) >= seen, steps[-3:]\n"
        "    assert all(len(r['samples'][0]) == r['step'] * 7 % 9000 for r in m.records())\n"
        "    seen = len(steps)\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(path)])
    metrics = MetricsFile(path)
    for step in range(records):
        metrics.append({"step": step, "samples": ["ä" * (step * 7 % 9000)]})
        assert path.read_bytes().endswith(b'"]}\n')  # nothing waits in a buffer
        time.sleep(0.002)
    assert reader.wait(timeout=60) == 0


def test_a_line_that_is_being_written_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rest, there a moment later, is no line: what follows would stand where it belongs."""
    path, loads = tmp_path / "m.jsonl", json.loads
    path.write_text('{"step": 0}\n{"st')

    def grow(text: str) -> object:
        if not text.endswith("\n"):
            with open(path, "a") as file:
                file.write('ep": 1}\n{"step": 2}\n')
        return loads(text)

    monkeypatch.setattr(json, "loads", grow)
    assert [r["step"] for r in MetricsFile(path).records()] == [0]
    monkeypatch.undo()
    with open(path, "a") as file:
        file.write('ep": 1}\n')
    assert [r["step"] for r in MetricsFile(path).records()] == [0, 1]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    metrics = make(tmp_path / "m.jsonl", {"step": 1, "grad_norm": float("inf"), "loss": 2.0})
    metrics.append({"step": 2, "samples": ["lone \ud800"]})
    lines = (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0], parse_constant=refuse)
    assert (first["grad_norm"], first["loss"]) == (None, 2.0)
    assert [r["step"] for r in metrics.records()] == [1, 2]
