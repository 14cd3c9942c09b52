"""Training on a GPU: its steps as one CUDA graph, without a wait, and what a run promises there.

The same without a GPU: test_device_step.py.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same_run, records
from test_device_step import PRESETS, assert_equal, make, run, state

from tinylm.config import TrainConfig
from tinylm.data import feed
from tinylm.device import choose_device, determinism
from tinylm.device_evaluation import DeviceEvaluation
from tinylm.device_step import DeviceStep
from tinylm.evaluate import evaluate
from tinylm.run import train
from tinylm.signals import Interrupted
from tinylm.step import LossScale
from tinylm.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Else the atomics of some of torch's kernels would add up in another order each time."""
    with determinism(True):
        yield


def gpu_step(precision: str = "auto", **options: Any) -> DeviceStep:
    step: DeviceStep = make(device=choose_device("cuda", precision), **options)
    said: list[str] = []
    step._say = said.append
    step.said = said  # type: ignore[attr-defined]
    return step


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("resident", [True, False])
def test_the_graph_gives_the_bits_of_eager_steps(
    preset: str, precision: str, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HALF_STEPS", 3)
    options = {"preset": preset, "micro_batch_size": 4, "weight_decay": 0.1, "log_every": 4}
    graph = gpu_step(precision, resident=resident, **options)
    eager = gpu_step(precision, cuda_graph=False, **options)
    assert run(graph, 20) == run(eager, 20)
    assert graph.said == []  # type: ignore[attr-defined]
    assert_equal(state(graph), state(eager))
    assert graph.scale == eager.scale


def test_losses_are_those_of_a_cpu() -> None:
    ours, theirs = run(gpu_step("fp32"), 10), run(make(), 10)
    assert [o.loss for o in ours] == pytest.approx([o.loss for o in theirs], rel=1e-3)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("resident", [True, False])
def test_steps_never_wait_for_the_gpu(
    cuda_graph: bool, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HALF_STEPS", 4)
    step = gpu_step(resident=resident, cuda_graph=cuda_graph, log_every=5)
    step.issue(1, 1.0)  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(2, 40):
            step.issue(i, 1.0 / i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not step.settle()[-1].overflow


IDS = np.random.default_rng(0).integers(0, 30, 50_000).astype(np.uint16)


def gpu_evaluation(
    step: DeviceStep, graphed: bool, prefix_only: bool, said: list[str]
) -> DeviceEvaluation:
    options: dict[str, Any] = {"seq_len": 8, "eos_id": 1, "unk_id": 0, "limit": None}
    options |= {"device": step.device, "prefix_only": prefix_only}
    return DeviceEvaluation(step.model, IDS, graphed=graphed, say=said.append, **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("prefix_only", [True, False])
def test_captured_evaluations_have_the_bits_of_eager_ones(
    preset: str, precision: str, prefix_only: bool
) -> None:
    step = gpu_step(precision, preset=preset)
    said: list[str] = []
    graph, eager = (gpu_evaluation(step, graphed, prefix_only, said) for graphed in (True, False))
    options: dict[str, Any] = {"eos_id": 1, "unk_id": 0, "seq_len": 8, "prefix_only": prefix_only}
    for number in range(1, 4):
        totals = graph()
        assert totals == eager()
        other = evaluate(step.model, IDS, device=step.device, **options)
        assert totals.nats == pytest.approx(other.nats, rel=1e-5)
        step.issue(number, 1.0)
        step.settle()
    assert said == []  # no capture failed


@pytest.mark.parametrize("graphed", [True, False])
def test_an_evaluation_waits_once(graphed: bool) -> None:
    evaluation = gpu_evaluation(gpu_step(), graphed, True, [])
    model = evaluation._model
    assert waits(evaluation) == 1
    assert waits(lambda: evaluate(model, IDS, eos_id=1, unk_id=0)) == 1


def waits(evaluation: Callable[[], object]) -> int:
    """How often the host waits for the device in an evaluation that is not the first."""
    evaluation()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluation()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len([w for w in caught if "synchronizing" in str(w.message)])


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_overflows_lower_the_scale(cuda_graph: bool) -> None:
    step = gpu_step("fp16", cuda_graph=cuda_graph)
    step.scale = LossScale(2.0**60)
    before = state(step)
    first = run(step, 3)
    assert all(o.overflow and not o.updated for o in first)
    assert step.scale == LossScale(2.0**57)
    assert_equal({n: t for n, t in state(step).items() if n in before}, before)
    step.scale = LossScale(1024.0)
    assert all(o.updated for o in run(step, 8, first=4))


def test_a_failed_step_halts_the_run_there() -> None:
    step = gpu_step()
    run(step, 4)
    before = state(step)
    weight = step.model.get_parameter("blocks.0.norm1.weight").data
    kept = weight.clone()
    weight[0] = float("nan")
    failed = run(step, 9, first=5)[0]
    assert (failed.step, failed.updated) == (5, False)
    weight.copy_(kept)
    assert_equal(state(step), before)
    step.begin(4, skipped=0)
    other = gpu_step()
    run(other, 4)
    assert run(step, 8, first=5) == run(other, 8, first=5)
    assert_equal(state(step), state(other))


def test_a_step_that_cannot_be_captured_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    step, other = gpu_step(), gpu_step(cuda_graph=False)
    plain = step.model.loss

    def asking(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.max().item()
        return plain(x, y)

    monkeypatch.setattr(step.model, "loss", asking)
    assert run(step, 8) == run(other, 8)
    assert_equal(state(step), state(other))
    (said,) = step.said  # type: ignore[attr-defined]
    assert said.startswith("steps run eagerly: capturing them as a CUDA graph failed")


@pytest.mark.parametrize("preset", ["modern", "notebook"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(
    small_run: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    resident: bool,
) -> None:
    if not resident:
        monkeypatch.setattr("tinylm.device_step.fits", lambda n_bytes, where: False)
    options = {"device": "cuda", "precision": "auto", "deterministic": True, "log_every": 4}
    train(small_run(preset, out=str(tmp_path / "whole"), **options), quiet=True)
    plain = Trainer._train_step

    def interrupted(self: Trainer, share: float) -> None:
        plain(self, share)
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(Interrupted):
            train(small_run(preset, out=str(tmp_path / "cut"), **options), quiet=True)
    train(small_run(preset, out=str(tmp_path / "cut"), **options), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert records(tmp_path / "cut", "loss")[-1]["step"] == 20
