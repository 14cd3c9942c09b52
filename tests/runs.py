"""What tests ask of a run folder: its records, its last state, and whether two are the same."""

import json
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint import CheckpointFolder, load_tensors
from tinylm.metrics import MetricsFile


def records(folder: Path, key: str) -> list[dict[str, Any]]:
    return [r for r in MetricsFile(folder / "metrics.jsonl").records() if key in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer after the last step."""
    said: list[str] = []
    checkpoint = CheckpointFolder(folder / "checkpoints").load_newest(said.append)
    assert checkpoint is not None, folder
    assert not said, said
    return checkpoint.tensors


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: last and best weights, optimizer state, losses, samples, evaluation."""
    for left, right in [
        (weights(a), weights(b)),
        (load_tensors(a / "model.safetensors")[0], load_tensors(b / "model.safetensors")[0]),
    ]:
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    for key in ("loss", "valid_loss", "samples", "epoch_loss"):
        assert [(r["step"], r[key]) for r in records(a, key)] == [
            (r["step"], r[key]) for r in records(b, key)
        ], key
    assert json.loads((a / "eval.json").read_text()) == json.loads((b / "eval.json").read_text())
