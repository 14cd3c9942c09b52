"""What can go wrong in a run beside being killed: each ends, or goes on, with a word about it."""

import errno
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, records, weights

from tinylm import cli, files
from tinylm import run as run_module
from tinylm import trainer as trainer_module
from tinylm.checkpoint import CheckpointFolder
from tinylm.config import TrainConfig
from tinylm.data.cache import locked
from tinylm.device import conditions
from tinylm.errors import InputError, TrainingError
from tinylm.run import resume_config, train
from tinylm.step import Outcome, TrainStep
from tinylm.trainer import Trainer
from tinylm.watch import MOST_SKIPPED

MakeConfig = Callable[..., TrainConfig]
ALWAYS = 1e-9  # seconds between checkpoints: one after every step


@pytest.fixture
def small_run(small_run: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """With little but training in it."""
    monkeypatch.setattr(trainer_module, "plot_loss", lambda *args: None)
    quick = {"eval_every": 5, "sample_every": 20}
    return lambda *preset, **options: small_run(*preset, **(quick | options))


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Puts a NaN into a gradient of the steps whose number is in ``calls``, counted from 1."""
    plain, count = TrainStep._clip, iter(range(1, 10**9))

    def poisoned(self: TrainStep) -> float:
        if next(count) in calls:
            assert self.model.embedding.weight.grad is not None
            self.model.embedding.weight.grad[3, 3] = math.nan
        return plain(self)

    monkeypatch.setattr(TrainStep, "_clip", poisoned)


# --- NaN -----------------------------------------------------------------------------------------


def test_nan_stops_with_a_message_and_all_that_was_learned(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 6)
    with pytest.raises(TrainingError, match=r"not finite at step 6 .* checkpoint is of step 5"):
        train(small_run(), quiet=True)
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_nan_skips_the_step_if_asked_and_says_so(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    poison(monkeypatch, 1, 6, 7, 12)
    train(small_run(on_nan="skip", log_every=1))
    said = capfd.readouterr().err
    assert said.count("this step is skipped") == 4
    assert "gradient is not finite at step 7 " in said
    assert [r["step"] for r in records(tmp_path / "run", "skipped")] == [1, 6, 7, 12]
    assert records(tmp_path / "run", "loss")[-1]["step"] == 20
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text.replace("nan", "")  # which is no JSON
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_a_run_that_skips_goes_on_bit_for_bit(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"log_every": 1, "checkpoint_seconds": ALWAYS}
    with monkeypatch.context() as patch:
        poison(patch, 6)
        train(small_run(out=str(tmp_path / "whole"), on_nan="skip", **options), quiet=True)
    with monkeypatch.context() as patch:
        poison(patch, 6)
        with pytest.raises(TrainingError):
            train(small_run(out=str(tmp_path / "cut"), **options), quiet=True)
    with monkeypatch.context() as patch:
        poison(patch, 1)  # the step it stopped at, which is the first now
        arguments = ["train", "--quiet", "--resume", str(tmp_path / "cut"), "--on-nan", "skip"]
        assert cli.main(arguments) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert resume_config(tmp_path / "cut").on_nan == "stop"  # as it began


def test_skipping_has_an_end(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(4, 100))
    with pytest.raises(TrainingError, match=f"after {MOST_SKIPPED} skipped in a row"):
        train(small_run(on_nan="skip"), quiet=True)
    assert len(records(tmp_path / "run", "skipped")) == MOST_SKIPPED


def test_weights_that_are_not_finite_are_never_saved(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer._train_step

    def ruined(self: Trainer, share: float) -> None:
        plain(self, share)
        if self.state.step == 6:
            self.model.embedding.weight.data[0, 0] = math.inf

    monkeypatch.setattr(Trainer, "_train_step", ruined)
    with pytest.raises(TrainingError, match=r"not finite after step 6; .* checkpoint is of step 5"):
        train(small_run(checkpoint_seconds=ALWAYS), quiet=True)
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_loss_spikes_are_told_once_each(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    plain, count = TrainStep.__call__, iter(range(1, 100))

    def spiking(self: TrainStep, *args: Any) -> Outcome:
        outcome = plain(self, *args)
        spike = 5.0 if next(count) in (8, 9, 15) else 0.0
        return Outcome(outcome.loss + spike, outcome.grad_norm, outcome.updated)

    monkeypatch.setattr(TrainStep, "__call__", spiking)
    train(small_run())
    assert [r["step"] for r in records(tmp_path / "run", "spike")] == [8, 15]
    spike = records(tmp_path / "run", "spike")[0]
    said = f"loss spike at step 8: {spike['spike']:.3f} where {spike['usual_loss']:.3f} was usual"
    assert said in capfd.readouterr().err


# --- disks and files -----------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint_seconds": ALWAYS, "log_every": 1}
    train(small_run(out=str(tmp_path / "whole"), **options), quiet=True)
    plain = files.os.fsync

    def full(descriptor: int) -> None:
        if len(CheckpointFolder(tmp_path / "cut" / "checkpoints").steps()) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(InputError) as failure:
            train(small_run(out=str(tmp_path / "cut"), **options), quiet=True)
    text = str(failure.value)
    assert "step-00000003.safetensors: the disk is full" in text
    assert "the last good checkpoint is of step 2" in text
    assert not list((tmp_path / "cut").rglob(".*.tmp"))
    train(small_run(out=str(tmp_path / "cut"), **options), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    small_run: MakeConfig, tmp_path: Path, small_disk: Path
) -> None:
    options = {"checkpoint_seconds": ALWAYS, "log_every": 1}
    train(small_run(out=str(tmp_path / "whole"), **options), quiet=True)
    with pytest.raises(InputError, match=r"the disk is full; .* good checkpoint is of step"):
        train(small_run(out=str(small_disk / "cut"), **options), quiet=True)
    enlarge = ["mount", "-o", "remount,size=4m", str(small_disk)]
    subprocess.run(enlarge, check=True)
    train(small_run(out=str(small_disk / "cut"), **options), quiet=True)
    assert_same_run(tmp_path / "whole", small_disk / "cut")


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_best_weights_are_found_anew(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool, capfd: Any
) -> None:
    poison(monkeypatch, 12)
    config = small_run(eval_every=5)
    with pytest.raises(TrainingError):
        train(config, quiet=True)
    path = tmp_path / "run" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 4
    path.write_bytes(content[:-20] if cut else content)
    train(config)
    assert "model.safetensors is damaged" in (said := capfd.readouterr().err)
    assert "keeping the best weights from here on" in said
    valid = records(tmp_path / "run", "valid_loss")
    assert [r["step"] for r in valid] == [0, 5, 10, 11, 15, 20]
    assert (tmp_path / "run" / "eval.json").exists()


def test_a_checkpoint_of_another_version_is_told(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3)
    with pytest.raises(TrainingError):
        train(small_run(), quiet=True)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    checkpoint = folder.load_newest(pytest.fail)
    assert checkpoint is not None
    checkpoint.state["mood"] = "good"
    folder.save(checkpoint)
    with pytest.raises(InputError, match="another version of tinylm"):
        train(small_run(), quiet=True)


def test_a_run_killed_while_its_folder_is_opened_goes_on(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = tmp_path / "run", run_module._write_beginning

    class Killed(BaseException):
        pass

    def cut_short(*args: Any) -> None:
        plain(*args)
        (folder / "config.json").unlink()
        (folder / ".config.json.abc.tmp").write_text("{")
        raise Killed

    for fresh in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_write_beginning", cut_short)
            with pytest.raises(Killed):
                train(small_run(steps=2), quiet=True, fresh=fresh)
        assert {p.name for p in folder.iterdir()} >= {".config.json.abc.tmp", "tokenizer.json"}
        train(small_run(steps=2), quiet=True, fresh=fresh)
        assert not list(folder.rglob(".*.tmp"))


def test_a_run_killed_while_it_is_replaced_goes_on(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its configuration is gone, and after."""
    folder, plain = tmp_path / "run", Path.unlink
    train(small_run(steps=4, out=str(tmp_path / "whole")), quiet=True)

    class Killed(BaseException):
        pass

    for survived in (1, 5):
        train(small_run(steps=3, seed=1), quiet=True, fresh=True)
        (folder / "notes").mkdir()
        left = iter(range(survived))

        def unlink(path: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if path.is_relative_to(folder) and next(left, None) is None:
                raise Killed
            plain(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(Killed):
                train(small_run(steps=4), quiet=True, fresh=True)
        train(small_run(steps=4), quiet=True, fresh=(folder / "config.json").exists())
        assert_same_run(tmp_path / "whole", folder)


def test_two_runs_cannot_share_a_folder(small_run: MakeConfig, tmp_path: Path) -> None:
    train(small_run(steps=2), quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with locked(tmp_path / "run" / "checkpoints"):
        for fresh in (False, True):
            with pytest.raises(InputError, match="another process is at work in"):
                train(small_run(steps=2), quiet=True, fresh=fresh)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    train(small_run(steps=2), quiet=True, fresh=True)


# --- the machine ---------------------------------------------------------------------------------


def test_a_resume_under_other_conditions_is_told_or_refused(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # restores it afterwards
    for deterministic in (False, True):
        config = small_run(out=str(tmp_path / str(deterministic)), deterministic=deterministic)
        with monkeypatch.context() as patch:
            poison(patch, 6)
            with pytest.raises(TrainingError):
                train(config, quiet=True)
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "conditions", lambda d: conditions(d) | {"threads": 77})
            if deterministic:
                with pytest.raises(InputError, match=r"threads is \d+ there and 77 here.*OMP_NUM"):
                    train(config, quiet=True)
            else:
                train(config)
                assert "threads is" in (said := capfd.readouterr().err)
                assert "the same only up to rounding" in said
        train(config, quiet=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_uses_only_such_algorithms(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = Trainer._train_step

    def look(self: Trainer, share: float) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        plain(self, share)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(Trainer, "_train_step", look)
    train(small_run(steps=2, deterministic=True, out=str(tmp_path / "a")), quiet=True)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    train(small_run(steps=2, out=str(tmp_path / "b")), quiet=True)
    assert seen == [True, True, False, False]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="cannot be limited by minutes"):
        small_run(steps=None, minutes=1.0, deterministic=True)


def test_micro_batches_may_change_when_a_run_goes_on(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"log_every": 1}
    train(small_run(out=str(tmp_path / "whole"), **options), quiet=True)
    with monkeypatch.context() as patch:
        poison(patch, 8)
        with pytest.raises(TrainingError):
            train(small_run(out=str(tmp_path / "cut"), **options), quiet=True)
    resumed = ["train", "--quiet", "--resume", str(tmp_path / "cut"), "--micro-batch-size", "2"]
    assert cli.main(resumed) == 0
    whole, cut = (records(tmp_path / name, "loss") for name in ("whole", "cut"))
    assert [r["loss"] for r in whole[:7]] == [r["loss"] for r in cut[:7]]  # step 8 is in parts
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in cut], rel=1e-4)


def test_a_clock_that_is_set_changes_nothing(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_run(out=str(tmp_path / "whole"), log_every=1), quiet=True)
    plain, generator = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: plain() + generator.uniform(-1e9, 1e9))
    train(small_run(out=str(tmp_path / "cut"), log_every=1), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    elapsed = [r["elapsed"] for r in records(tmp_path / "cut", "loss")]
    assert elapsed == sorted(elapsed)
    began = time.monotonic()
    train(small_run(out=str(tmp_path / "timed"), steps=None, minutes=0.02), quiet=True)
    assert 1.2 <= records(tmp_path / "timed", "loss")[-1]["elapsed"] <= time.monotonic() - began


def memory() -> tuple[float, int]:
    """This process's resident MB, and how many tensors are alive."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    alive = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, alive


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux shows it")
def test_memory_stays_flat(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[float, int]] = {}
    plain = Trainer._train_step

    def measured(self: Trainer, share: float) -> None:
        plain(self, share)
        if self.state.step in (200, 1000):
            seen[self.state.step] = memory()

    monkeypatch.setattr(Trainer, "_train_step", measured)
    config = small_run(
        steps=1001, d_model=8, n_heads=2, n_layers=1, eval_every=50, eval_tokens=16,
        sample_every=100, seq_len=8, batch_size=4,
        checkpoint_seconds=0.2, log_every=100,
    )  # fmt: skip
    gc.freeze()  # What earlier tests have left behind is not looked at.
    try:
        train(config, quiet=True)
    finally:
        gc.unfreeze()
    assert 0 < seen[1000][1] == seen[200][1]
    assert seen[1000][0] - seen[200][0] < 4.0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().split("\n")) < 60
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["loss"] > 0
