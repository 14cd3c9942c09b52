"""The comparison of presets: its figures, its files, and that a stop costs nothing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinylm import run as run_module
from tinylm.cli import main
from tinylm.config import PRESETS, ModelConfig
from tinylm.errors import InputError
from tinylm.evaluate import evaluate_full_prefix
from tinylm.lm import load_config
from tinylm.model import Transformer
from tinylm.reproduce import reproduce
from tinylm.trainer import Trainer

SMALL = {"d_model": 16, "n_heads": 2, "d_ff": 24, "eval_every": 1000}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets as they are, but narrow, and evaluated at the ends of a run only."""
    for name, options in PRESETS.items():
        monkeypatch.setitem(PRESETS, name, options | SMALL)


def arguments(corpus: Path, out: Path, *more: object) -> list[str]:
    data = ["--data", corpus, "--vocab-size", 60, "--device", "cpu", "--out", out]
    return [str(a) for a in ["reproduce", *data, *more]]


def test_presets_side_by_side(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report"
    assert main(arguments(corpus, out, "--tokens", 16384)) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    rows = report["presets"]
    assert list(rows) == ["notebook", "causal", "modern"]
    assert {row["tokens"] for row in rows.values()} == {16384}  # whole batches of 512, 2048, 4096
    evaluated = [json.loads((out / name / "eval.json").read_text()) for name in rows]
    assert {e["tokens"] for e in evaluated} == {report["valid_tokens"]}
    assert {e["bytes"] for e in evaluated} == {evaluated[0]["bytes"]}
    for row, evaluation in zip(rows.values(), evaluated, strict=True):
        assert row["loss"] == evaluation["loss"]
        assert row["bits_per_byte"] == evaluation["bits_per_byte"]
        assert len(set(row["samples"])) == 3
        assert len({" ".join(text.split()[-10:]) for text in row["samples"]}) == 3  # not one draw
    assert rows["notebook"]["leaked_loss"] == evaluated[0]["leaked_loss"]
    assert rows["causal"]["leaked_loss"] is None
    assert rows["modern"]["full_prefix_loss"] == pytest.approx(rows["modern"]["loss"], rel=0.1)
    counted = report["baselines"]
    assert counted["trigram"]["loss"] < counted["unigram"]["loss"]
    written = (out / "report.md").read_text(encoding="utf-8")
    assert shown.strip() in written
    for part in (
        "| `notebook` |",
        "| trigram (counting alone) |",
        "16,384 tokens each",
        "> ",
        "256 (`modern`)",
    ):
        assert part in written
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(out / "notebook").data == load_config(out / "modern").data


def test_a_stopped_report_goes_on_where_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out, steps = tmp_path / "report", []
    plain = Trainer._train_step

    def step(self: Trainer, share: float) -> None:
        plain(self, share)
        steps.append((self.config.preset, self.state.step))
        if len(steps) == 4 + 3:  # in the middle of the second run
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", step)
    command = arguments(corpus, out, "--tokens", 8192, "--presets", "causal,notebook")
    assert main(command) == 130
    assert "the same command goes on from there" in capfd.readouterr().err
    assert not (out / "report.json").exists()
    assert main(command) == 0
    # Nothing was trained twice.
    assert steps == [("causal", i) for i in range(1, 5)] + [("notebook", i) for i in range(1, 17)]
    assert "resuming from the checkpoint of step 3" in capfd.readouterr().err
    steps.clear()
    assert main(command) == 0
    assert steps == []


def test_minutes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.config import DataConfig

    asked = {}

    class Enough(Exception):
        pass

    def train(config: Any, **options: Any) -> None:
        asked[config.preset] = config
        raise Enough

    monkeypatch.setattr("tinylm.reproduce.train", train)
    data = DataConfig(data=str(corpus), tokenizer="word")
    with pytest.raises(Enough):
        reproduce(data, tmp_path, minutes=0.5, seed=3)
    config = asked["notebook"]
    assert (config.minutes, config.steps, config.epochs, config.seed) == (0.5, None, None, 3)
    for options, message in [
        ({}, "either minutes or tokens"),
        ({"minutes": 1.0, "tokens": 5}, "either minutes or tokens"),
        ({"minutes": 0.0}, "a budget of 0 trains nothing"),
        ({"tokens": -1}, "a budget of -1 trains nothing"),
        ({"tokens": 10, "presets": []}, "name each preset once"),
        ({"tokens": 10, "presets": ["causal", "causal"]}, "name each preset once"),
        ({"tokens": 10, "presets": ["gpt5"]}, "unknown preset 'gpt5'"),
    ]:
        with pytest.raises(InputError, match=message):
            reproduce(data, tmp_path, **options)
    assert run_module.train is not train


@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_given_a_full_prefix(causal: bool) -> None:
    config = ModelConfig(
        vocab_size=11, d_model=16, n_layers=1, n_heads=2, d_ff=8, max_seq_len=6, causal=causal
    )
    model = Transformer(config, seed=0)
    with torch.no_grad():
        model.embedding.weight *= 40
    ids = np.random.default_rng(0).integers(0, 11, 30).astype(np.uint16)
    totals = evaluate_full_prefix(model, ids, seq_len=6, first=8, limit=5)
    with torch.no_grad():
        nats = [
            -torch.log_softmax(model(torch.tensor([ids[t - 6 : t].tolist()]))[0, -1], 0)[ids[t]]
            for t in np.linspace(8, 29, 5).round().astype(int)
        ]
    assert totals.tokens == 5
    assert totals.nats == pytest.approx(float(sum(nats)), rel=1e-5)
    assert evaluate_full_prefix(model, ids, seq_len=6, first=30, limit=5).tokens == 0
