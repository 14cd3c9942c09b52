"""The scripts of ``bench/`` that no other test runs, at sizes that say nothing about speed."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
TRAIN = "bench_train.py --device cpu --shapes 2x16 --no-compile --rounds 1 --seconds 0.01"


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (TRAIN, ["| `causal` 2x16 |", "| `modern` 2x16 |"]),
        ("profile_step.py --shape 2x16 --steps 1", ["| Muon |", "| whole step |"]),
    ],
)
def test_it_runs_to_its_end(command: str, rows: list[str]) -> None:
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, BENCH / script, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(row in done.stdout for row in rows)
