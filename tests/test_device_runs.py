"""Whole runs whose steps stay on the device, here a CPU: the record of a run on the host, and
that they stop, resume, skip and follow the clock as one does."""

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_run, records

from tinylm import cli, device_step, trainer
from tinylm.config import TrainConfig
from tinylm.device_step import DeviceStep
from tinylm.errors import TrainingError
from tinylm.run import train
from tinylm.signals import Interrupted
from tinylm.step import Outcome
from tinylm.trainer import Trainer
from tinylm.watch import MOST_SKIPPED

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def device_run(
    small_run: MakeConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> MakeConfig:
    """Runs of which this CPU is the device."""
    monkeypatch.setattr(trainer, "runs_on_device", lambda device, world: True)
    monkeypatch.setattr(device_step, "fits", lambda n_bytes, where: request.param)
    monkeypatch.setattr(trainer, "plot_loss", lambda *args: None)
    quick = {"eval_every": 10, "sample_every": 20, "log_every": 4, "d_model": 16, "seq_len": 8}
    return lambda *preset, **options: small_run(*preset, **(quick | options))


def poison_runs(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Puts a NaN into a gradient of the steps whose number is in ``numbers``."""
    plain = DeviceStep._clip_norm

    def poisoned(self: DeviceStep) -> torch.Tensor:
        if int(self._step) + 1 in numbers:
            assert self.model.embedding.weight.grad is not None
            self.model.embedding.weight.grad[3, 3] = math.nan
        return plain(self)

    monkeypatch.setattr(DeviceStep, "_clip_norm", poisoned)


def test_a_run_has_the_record_of_one_on_the_host(
    device_run: MakeConfig, small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(device_run(out=str(tmp_path / "device"), steps=30), quiet=True)
    monkeypatch.setattr(trainer, "runs_on_device", lambda device, world: False)
    train(device_run(out=str(tmp_path / "host"), steps=30), quiet=True)
    for key in ("loss", "valid_loss", "epoch_loss"):
        ours, theirs = (records(tmp_path / name, key) for name in ("device", "host"))
        assert [(r["step"], r["tokens"]) for r in ours] == [
            (r["step"], r["tokens"]) for r in theirs
        ]
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=1e-3)
    assert [r["step"] for r in records(tmp_path / "device", "loss")] == [*range(4, 29, 4), 30]
    ours, theirs = (records(tmp_path / name, "lr") for name in ("device", "host"))
    assert [r["lr"] for r in ours] == [r["lr"] for r in theirs]


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    plain = Trainer._train_step

    def interrupted(self: Trainer, share: float) -> None:
        plain(self, share)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Trainer, "_train_step", interrupted)


@pytest.mark.parametrize("stop", [6, 8])
def test_a_stopped_run_goes_on_bit_for_bit(
    device_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    train(device_run(out=str(tmp_path / "whole")), quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Interrupted) as interrupted:
            train(device_run(out=str(tmp_path / "cut")), quiet=True)
    assert interrupted.value.step == stop
    train(device_run(out=str(tmp_path / "cut")), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_micro_batches_may_change_when_a_run_goes_on(
    device_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(device_run(out=str(tmp_path / "whole")), quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Interrupted):
            train(device_run(out=str(tmp_path / "cut")), quiet=True)
    resumed = ["train", "--quiet", "--resume", str(tmp_path / "cut"), "--micro-batch-size", "2"]
    assert cli.main([*resumed, "--no-cuda-graph"]) == 0
    whole, cut = (records(tmp_path / name, "loss") for name in ("whole", "cut"))
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in cut], rel=1e-3)


def test_nan_stops_or_is_skipped_as_asked(
    device_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison_runs(patch, 6)
        train(device_run(out=str(tmp_path / "whole"), on_nan="skip"), quiet=True)
        skipped = records(tmp_path / "whole", "skipped")
        assert [r["step"] for r in skipped] == [6]
        with pytest.raises(TrainingError, match=r"not finite at step 6 .* checkpoint is of step 5"):
            train(device_run(out=str(tmp_path / "cut")), quiet=True)
        arguments = ["train", "--quiet", "--resume", str(tmp_path / "cut"), "--on-nan", "skip"]
        assert cli.main(arguments) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with monkeypatch.context() as patch:
        poison_runs(patch, *range(4, 30))
        with pytest.raises(TrainingError, match=f"after {MOST_SKIPPED} skipped in a row"):
            train(device_run(out=str(tmp_path / "never"), on_nan="skip"), quiet=True)
    assert len(records(tmp_path / "never", "skipped")) == MOST_SKIPPED


def test_a_run_by_the_clock_follows_its_schedule(
    device_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.5 * next(ticks))
    monkeypatch.setattr(trainer, "time", clock)
    train(device_run(steps=None, minutes=0.5), quiet=True)
    logged = records(tmp_path / "run", "lr")
    assert logged[-1]["elapsed"] >= 30
    assert logged[-1]["lr"] < 0.2 * max(r["lr"] for r in logged)
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["loss"] < records(tmp_path / "run", "valid_loss")[0]["valid_loss"]


def test_spikes_are_told_with_their_step(
    device_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DeviceStep._outcomes

    def spiking(self: DeviceStep) -> list[Outcome]:
        return [replace(o, loss=o.loss + 5.0 * (o.step in (9, 10, 15))) for o in plain(self)]

    monkeypatch.setattr(DeviceStep, "_outcomes", spiking)
    train(device_run(), quiet=True)
    assert [r["step"] for r in records(tmp_path / "run", "spike")] == [9, 15]
