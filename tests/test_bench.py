"""The benchmark command, on next to nothing: what it compares, says and refuses. No timings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm import bench
from tinylm.cli import main
from tinylm.config import TrainConfig
from tinylm.device import choose_device
from tinylm.kernels import attention, check, dispatch
from tinylm.tokenizer import backend, implementation

TINY = bench.Size(
    text_bytes=20_000, bpe_vocab_size=300, vocab_size=200, new_tokens=6, seconds=0.0,
    model=(("d_model", 16), ("n_heads", 2), ("n_layers", 1), ("d_ff", 24), ("batch_size", 2)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "USUAL", TINY)
    monkeypatch.setattr(check, "SECONDS", 0)
    cases = [
        check._head(9, 30, 8),
        check._attention(2, 5, 5, 8, (2, 2)),
        check._norm("rms_norm", 3, 8),
    ]
    monkeypatch.setattr(check, "training_cases", lambda: cases)


def test_one_table_and_one_json(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "--device", "cpu", "--out", str(out)]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    for name in ("machine", "device", "threads", "torch", "python", "tinylm"):
        assert f"{name:10}{found['about'][name]}" in shown
    assert found["about"]["threads"] == torch.get_num_threads()
    parts = (
        "word tokenizer, train", "word tokenizer, encode", "BPE tokenizer, train",
        "BPE tokenizer, encode", "linear_cross_entropy", "causal_attention", "rms_norm",
        "training modern", "training causal", "generation",
    )  # fmt: skip
    assert len(found["results"]) == len(parts)
    for part, row in zip(parts, found["results"], strict=True):
        assert row["what"].startswith(part)
        assert row["what"] in shown
        assert row["ratio"] == pytest.approx(row["tinylm"] / row["reference"])
        assert row["reference"] > 0
    assert implementation()[0] in found["results"][0]["runs"]


def test_settings_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ((dispatch.ENVIRONMENT_VARIABLE, "torch"), (backend.VARIABLE, "python")):
        monkeypatch.setenv(name, value)
    seen = []
    plain = dispatch.torch_choice

    def look(operator: str, device_type: str) -> tuple[str, str]:
        seen.append(dispatch.setting())
        return plain(operator, device_type)

    monkeypatch.setattr(dispatch, "torch_choice", look)
    rows = list(bench.rows(choose_device("cpu")))
    assert (dispatch.setting(), implementation()[0]) == ("torch", "python")
    assert {"torch"} <= set(seen)
    assert {row.runs for row in rows[:4]} == {"python"}


def test_what_is_wrong_is_not_timed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._blocked
    monkeypatch.setattr(attention, "_blocked", lambda *inputs: right(*inputs) * 1.1)
    assert main(["bench", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "causal_attention and its reference differ" in shown.err
    assert "training" not in shown.out


def test_both_sides_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain side of a training step runs the references, in all of its turns."""
    ran: list[str] = []
    for name in ("_matmul", "_blocked"):
        plain = getattr(attention, name)

        def noted(*inputs: Any, plain: Any = plain, name: str = name) -> Any:
            ran.append(name)
            return plain(*inputs)

        monkeypatch.setattr(attention, name, noted)
    row = bench._training("causal", torch.arange(5000).numpy() % 200, choose_device("cpu"), TINY)
    layers = TrainConfig.from_preset("causal", **dict(TINY.model)).model.n_layers
    assert ran == ["_matmul"] * 3 * layers + ["_blocked"] * 3 * layers + ["_matmul", "_blocked"]
    assert row.runs.endswith("eager")
