"""The time left that a run shows, against a clock that the test turns."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import records

from tinylm import run as run_module
from tinylm import trainer as trainer_module
from tinylm.config import TrainConfig
from tinylm.run import train
from tinylm.signals import Interrupted
from tinylm.trainer import Trainer


class Clock:
    """Seconds pass only where the test says so: what a `Trainer` does takes a given time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.shown: list[tuple[float, float, float]] = []  # share done, now, seconds left
        self._patch = monkeypatch
        monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        plain = Trainer._show

        def show(trainer: Trainer) -> None:
            plain(trainer)
            if (left := trainer.seconds_left()) is not None:
                self.shown.append((trainer.share, self.now, left))

        monkeypatch.setattr(Trainer, "_show", show)

    def takes(self, owner: Any, name: str, seconds: Callable[[], float]) -> None:
        plain = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            self.now += seconds()
            return plain(*args, **options)

        self._patch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("length", "every"),
    [
        ({"steps": 200}, {}),
        ({"steps": 200}, {"eval_every": 15, "sample_every": 70}),
        ({"steps": None, "epochs": 2.0, "batch_size": 16}, {}),
        ({"steps": None, "minutes": 5.0}, {}),
        ({"steps": None, "minutes": 5.0}, {"eval_every": 30}),
    ],
)
def test_the_time_left_is_right_within_a_tenth(
    small_run: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    length: dict[str, Any],
    every: dict[str, int],
) -> None:
    clock, generator = Clock(monkeypatch), random.Random(0)
    first = iter([25.0])  # the first step compiles, say
    step = lambda: next(first, generator.uniform(0.5, 1.5))  # noqa: E731
    clock.takes(Trainer, "_train_step", step)
    precise = iter([7.0])  # the first evaluation is in fp32, as the last is
    clock.takes(Trainer, "_evaluate", lambda: next(precise, 4.0))
    clock.takes(Trainer, "_sample", lambda: 12.0)  # too much not to be known from the start
    clock.takes(Trainer, "save_checkpoint", lambda: 1.0)
    tokens = 256  # of the validation split, in each evaluation but the last
    config = small_run(eval_tokens=tokens, checkpoint_seconds=20.0, log_every=50, **length, **every)
    last = run_module.evaluate_dataset

    def whole(lm: Any, dataset: Any, **options: Any) -> Any:
        clock.now += 7.0 * len(dataset.valid) / tokens
        return last(lm, dataset, **options)

    monkeypatch.setattr(run_module, "evaluate_dataset", whole)
    train(config, quiet=True)
    checked = [(share, now, left) for share, now, left in clock.shown if share >= 0.1]
    assert len(checked) > 25
    total = clock.now - 1000.0
    for share, now, left in checked:
        true = clock.now - now
        assert abs(left - true) <= max(0.1 * true, 0.01 * total), (share, left, true)


@pytest.mark.parametrize(("minutes", "evaluations"), [(1.0, (3, 4)), (60.0, (21, 21))])
def test_evaluations_leave_a_short_run_its_time(
    small_run: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    evaluations: tuple[int, int],
) -> None:
    clock = Clock(monkeypatch)
    clock.takes(Trainer, "_train_step", lambda: minutes)
    clock.takes(Trainer, "_evaluate", lambda: 2.0)
    clock.takes(Trainer, "_sample", lambda: 0.5)
    train(small_run(steps=None, minutes=minutes), quiet=True)
    least, most = evaluations
    assert least <= len(records(tmp_path / "run", "valid_loss")) <= most
    assert len(records(tmp_path / "run", "samples")) >= 2  # at both ends
    in_steps = records(tmp_path / "run", "loss")[-1]["step"] * minutes
    assert in_steps >= 0.9 * 60 * minutes - 2.5 - minutes  # the last ones have to be


def test_a_resumed_run_knows_only_its_own_session(
    small_run: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first session was ten times slower; its pace says nothing about the second."""
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        clock.takes(Trainer, "_train_step", lambda: 10.0)
        plain = Trainer._train_step

        def stop(trainer: Trainer, share: float) -> None:
            plain(trainer, share)
            if trainer.state.step == 50:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Trainer, "_train_step", stop)
        with pytest.raises(Interrupted):
            train(small_run(steps=100), quiet=True)
    clock = Clock(monkeypatch)
    clock.takes(Trainer, "_train_step", lambda: 1.0)
    train(small_run(steps=100), quiet=True)
    assert clock.shown[0][0] == 0.52  # the first step tells nothing
    for share, _, left in clock.shown:
        assert left == pytest.approx(100 * (1 - share))
