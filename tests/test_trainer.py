"""Training runs: what they leave behind, and that no interruption changes their result."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import assert_same_run, records

from tinylm import trainer as trainer_module
from tinylm.checkpoint import CheckpointFolder
from tinylm.config import TrainConfig
from tinylm.errors import InputError
from tinylm.run import resume_config, train
from tinylm.signals import Interrupted
from tinylm.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def test_a_run_learns_and_leaves_everything(small_run: MakeConfig, tmp_path: Path) -> None:
    config = small_run(steps=60, log_every=5)
    lm = train(config, quiet=True)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "tokenizer.json", "spelling.safetensors", "model.safetensors",
        "metrics.jsonl", "eval.json", "samples.txt", "loss.png", "checkpoints",
    }  # fmt: skip
    losses = [r["loss"] for r in records(folder, "loss")]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    valid = records(folder, "valid_loss")
    assert valid[0]["step"] == 0
    assert valid[-1]["step"] == 60
    result = json.loads((folder / "eval.json").read_text())
    assert result["loss"] == pytest.approx(min(r["valid_loss"] for r in valid), abs=0.02)
    keys = "loss perplexity top1 top5 bits_per_byte unk_share known_loss known_top1 tokens bytes"
    assert set(keys.split()) <= result.keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "=== step 60 ===" in (folder / "samples.txt").read_text()
    assert lm.model.parameter_count() == sum(p.numel() for p in lm.model.parameters())
    assert lm.generate("they were", max_new_tokens=3, seed=0).startswith("they were ")


def test_the_same_configuration_gives_the_same_run(small_run: MakeConfig, tmp_path: Path) -> None:
    train(small_run(out=str(tmp_path / "a")), quiet=True)
    train(small_run(out=str(tmp_path / "b")), quiet=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Sends this process a signal in the middle of a training step."""
    plain = Trainer._train_step

    def interrupted(self: Trainer, share: float) -> None:
        plain(self, share)
        if self.state.step == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


@pytest.mark.parametrize("preset", ["modern", "causal", "notebook"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_bit_for_bit(
    small_run: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: int,
    preset: str,
) -> None:
    options = {"log_every": 3, "precision": "bf16" if preset == "modern" else "fp32"}
    train(small_run(preset, out=str(tmp_path / "whole"), **options), quiet=True)
    config = small_run(preset, out=str(tmp_path / "cut"), **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 7, signum)
        with pytest.raises(Interrupted) as stop:
            train(config, quiet=True)
    assert (stop.value.step, stop.value.signum) == (7, signum)
    assert not (tmp_path / "cut" / "eval.json").exists()
    train(config, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_kill_at_random_moments_loses_nothing() -> None:
    script = [sys.executable, str(Path(__file__).parent / "kill_training.py")]
    done = subprocess.run(
        [*script, "--kills", "5", "--per-run", "5", "--seed", str(random.randrange(10**6))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills of" in done.stdout


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    options = {"checkpoint_seconds": 1e-9}
    train(small_run(out=str(tmp_path / "whole"), **options), quiet=True)
    config = small_run(out=str(tmp_path / "cut"), **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 9, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(config, quiet=True)
    newest = CheckpointFolder(tmp_path / "cut" / "checkpoints").path(9)
    newest.write_bytes(newest.read_bytes()[:-100])
    train(config)
    said = capfd.readouterr().err
    assert "step-00000009.safetensors is damaged" in said
    assert "resuming from the checkpoint of step 8" in said
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_not_trained_again(small_run: MakeConfig, capfd: Any) -> None:
    config = small_run(steps=3)
    train(config, quiet=True)
    train(config)
    assert "is already trained; --fresh trains it again" in capfd.readouterr().err
    train(config, fresh=True)
    assert "already" not in capfd.readouterr().err


def test_a_folder_of_another_configuration_is_refused(
    small_run: MakeConfig, tmp_path: Path
) -> None:
    train(small_run(steps=2), quiet=True)
    with pytest.raises(InputError, match=r"another configuration \(lr is 0.005 there and 0.1 here"):
        train(small_run(steps=2, lr=0.1), quiet=True)
    train(small_run(steps=2, keep_checkpoints=1), quiet=True)  # changes nothing that is learned
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(InputError, match="is not a run folder"):
            train(small_run(out=str(tmp_path / "other")), quiet=True, fresh=fresh)
        file = str(tmp_path / "other" / "thesis.txt")
        with pytest.raises(InputError, match="is a file"):
            train(small_run(out=file), quiet=True, fresh=fresh)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_changed_data_are_noticed(small_run: MakeConfig, corpus: Path) -> None:
    train(small_run(steps=2), quiet=True)
    corpus.write_text(corpus.read_text() + '{"text": "Something new to read."}\n')
    with pytest.raises(InputError, match="the data have changed"):
        train(small_run(steps=2), quiet=True)


def test_resume_config_is_the_one_asked_for(small_run: MakeConfig, tmp_path: Path) -> None:
    config = small_run(steps=2)
    train(config, quiet=True)
    assert resume_config(tmp_path / "run") == config
    with pytest.raises(InputError, match="is not a run folder"):
        resume_config(tmp_path)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        resume_config(tmp_path / "run")


def test_micro_batches_give_the_same_run(small_run: MakeConfig, tmp_path: Path) -> None:
    train(small_run(out=str(tmp_path / "a")), quiet=True)
    train(small_run(out=str(tmp_path / "b"), micro_batch_size=2), quiet=True)
    for a, b in zip(records(tmp_path / "a", "loss"), records(tmp_path / "b", "loss"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_time_budget_ends_the_run_and_fits_the_schedule(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.5 * next(ticks))  # each look at it takes 0.5 s
    monkeypatch.setattr(trainer_module, "time", clock)
    config = small_run(steps=None, minutes=1.0, optimizer=optimizer, log_every=1, weight_decay=0.1)
    train(config, quiet=True)
    logged = records(tmp_path / "run", "loss")
    assert 60 <= logged[-1]["elapsed"] < 65
    assert logged[-1]["lr"] < 0.2 * max(r["lr"] for r in logged)


def test_epochs_end_where_the_text_does(small_run: MakeConfig, tmp_path: Path) -> None:
    train(small_run(steps=None, epochs=2.0, batch_size=64), quiet=True)
    epochs = records(tmp_path / "run", "epoch")
    assert [r["epoch"] for r in epochs] == [1, 2]
    assert epochs[1]["epoch_loss"] < epochs[0]["epoch_loss"]
    assert epochs[1]["step"] == records(tmp_path / "run", "loss")[-1]["step"]


def test_weights_decay_by_the_length_of_an_epoch(small_run: MakeConfig, capfd: Any) -> None:
    """Of the training text, invented scripts included; as said, unless another is asked for."""
    train(small_run(steps=None, epochs=2.0, batch_size=4, log_every=1000))
    said = capfd.readouterr().err
    length = re.search(r"length  (\d+) steps", said)
    assert length is not None
    steps = int(length[1]) / 2
    matrices, embeddings = 1 / steps / 0.01, 0.5 / steps / 0.005
    assert steps > 100  # else it would be bounded
    shown = re.search(r"decay   of weights: (\S+) of matrices, (\S+) of embeddings", said)
    assert shown is not None
    assert [float(n) for n in shown.groups()] == pytest.approx([matrices, embeddings], rel=0.02)
    train(small_run(weight_decay=0.0, embedding_decay=0.0), fresh=True)
    assert "decay   of weights" not in capfd.readouterr().err


def test_the_notebook_shows_its_leak(small_run: MakeConfig, tmp_path: Path, capfd: Any) -> None:
    train(small_run("notebook", steps=400, lr=3e-3, log_every=50))
    said = capfd.readouterr().err
    assert "warning: this model has no causal mask" in said
    assert "given the prefix only (leaked" in said
    last = records(tmp_path / "run", "valid_leaked_loss")[-1]
    assert last["valid_leaked_loss"] < last["valid_loss"] - 0.3
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["leaked_loss"] < result["loss"] - 0.3
    assert result["leaked_top1"] > result["top1"]


def test_the_notebook_stream_has_one_end(small_run: MakeConfig) -> None:
    from tinylm.data import prepare

    dataset = prepare(small_run("notebook").data, progress=False)
    ids = dataset.train.ids
    assert (ids == dataset.tokenizer.eos_id).sum() == 1
    assert ids[-1] == dataset.tokenizer.eos_id
    windowed = small_run("notebook")
    assert (windowed.stride, windowed.batch_size, windowed.lr) == (1, 8, 1e-4)


def test_bpe_runs_have_no_unknown_words(small_run: MakeConfig, tmp_path: Path) -> None:
    lm = train(small_run(tokenizer="bpe", vocab_size=300, steps=5), quiet=True)
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["unk_share"] == 0
    assert result["known_loss"] == result["loss"]
    assert lm.generate("Thé 😀", max_new_tokens=8, seed=0).startswith("Thé 😀")


def test_a_corpus_shorter_than_a_window_is_refused_before_anything_is_written(
    small_run: MakeConfig, tmp_path: Path
) -> None:
    short, valid = tmp_path / "short.txt", tmp_path / "valid.txt"
    short.write_text("only a few words")
    valid.write_text("a few words of validation")
    with pytest.raises(InputError, match="fewer than one window of 16"):
        train(small_run(data=str(short), valid=str(valid), vocab_size=5), quiet=True)
    assert not (tmp_path / "run").exists()
