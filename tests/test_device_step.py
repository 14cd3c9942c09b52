"""Steps that run on a device from end to end, here on a CPU: the same windows, losses and weights
as steps that the host looks after, and nothing in them that a CUDA graph could not hold.

What needs a GPU stands in test_gpu.py.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_device import MetaDevice, OnDeviceOnly

from tinylm import device_step, graph
from tinylm.config import TrainConfig
from tinylm.data import feed
from tinylm.data.feed import DeviceWindows
from tinylm.data.windows import WindowSampler
from tinylm.device import Device
from tinylm.device_step import DeviceStep
from tinylm.distributed import World
from tinylm.model import Transformer
from tinylm.optim import Optimizer
from tinylm.step import LossScale, Outcome, Step, TrainStep
from tinylm.watch import MOST_SKIPPED

PRESETS = ["modern", "causal", "notebook"]
VOCABULARY = 30


def make(
    on_device: bool = True,
    preset: str = "modern",
    precision: str = "fp32",
    resident: bool = True,
    device: Device | None = None,
    **options: Any,
) -> Any:
    """A small step with weights of its own; equal arguments give equal steps."""
    small = {"d_model": 16, "d_ff": 24, "n_heads": 2, "seq_len": 8, "steps": 5, "batch_size": 8}
    config = TrainConfig.from_preset(preset, **(small | options))
    config = replace(config, model=replace(config.model, vocab_size=VOCABULARY))
    model = Transformer(config.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some begin at zero, and hide the gradients of others
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    device = device or Device("cpu", precision, "for a test")
    model.to(device.torch_device)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 999).astype(np.uint16)
    sampler = WindowSampler(ids, config.seq_len, config.batch_size, config.stride, config.seed)
    muon_dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
    parts = model, Optimizer(model, config, muon_dtype, on_device), config, device
    if on_device:
        return DeviceStep(*parts, sampler, resident=resident)
    return TrainStep(*parts, sampler=sampler)


def run(step: Step, last: int, first: int = 1) -> list[Outcome]:
    """Outcomes of steps, whose learning rates a float holds exactly."""
    factors = itertools.cycle((1.0, 0.5, 0.25))
    out = [o for i in range(first, last + 1) for o in step.issue(i, next(factors))]
    return out + step.settle()


def state(step: Step) -> dict[str, torch.Tensor]:
    tensors = step.model.state_dict() | step.optimizer.state_tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def poison(step: Step, when: Callable[[int], bool], bad: float = math.nan) -> None:
    """Puts ``bad`` into the gradient of some calls of a step, counted from 1."""
    count = itertools.count(1)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, bad) if when(next(count)) else gradient

    step.model.get_parameter("blocks.0.norm1.weight").register_hook(hook)


# --- windows -------------------------------------------------------------------------------------


@given(
    tokens=st.integers(20, 400),
    stride=st.sampled_from([None, 1, 3]),
    half=st.integers(1, 5),
    resident=st.booleans(),
    wide=st.booleans(),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_the_device_has_the_very_windows_of_the_host(
    tokens: int, stride: int | None, half: int, resident: bool, wide: bool, steps: list[int]
) -> None:
    dtype = np.uint32 if wide else np.uint16
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, tokens).astype(dtype)
    ids.setflags(write=False)  # as a memory map is
    sampler = WindowSampler(ids, 7, 3, stride, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "HALF_STEPS", half)
        patch.setattr(feed, "UPLOAD_TOKENS", 100)
        windows = DeviceWindows(sampler, torch.device("cpu"), resident)
    for start in steps:  # somewhere, and from there one after the other
        for step in range(start, start + 2 * half + 3):
            windows.prepare(step)
            batch = windows.batch(torch.tensor(step))
            for ours, theirs in zip(batch, sampler.batch(step), strict=True):
                assert ours.dtype == torch.int64
                assert np.array_equal(ours.numpy(), theirs)


def test_large_rows_take_no_more_memory() -> None:
    sampler = WindowSampler(np.zeros(10**6, dtype=np.uint16), 256, 4096)
    windows = DeviceWindows(sampler, torch.device("cpu"), resident=False)
    assert windows._table._table.nbytes <= 2 * feed.HALF_BYTES


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    sampler = WindowSampler(np.zeros(100, dtype=np.uint16), 8, 2)
    windows = DeviceWindows(sampler, torch.device("cpu"), resident=False)
    sampler.tokens = sampler.tokens[:10]
    with pytest.raises(IndexError):
        windows.prepare(0)


# --- the same steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("resident", [True, False])
def test_losses_and_weights_are_those_of_the_host(preset: str, resident: bool) -> None:
    options = {"preset": preset, "micro_batch_size": 4, "weight_decay": 0.125, "log_every": 3}
    device, host = make(True, resident=resident, **options), make(False, **options)
    ours, theirs = run(device, 20), run(host, 20)
    assert [(o.step, o.lr_factor) for o in ours] == [(o.step, o.lr_factor) for o in theirs]
    assert ours[0] == theirs[0]  # before the first update, the same bits
    for a, b in zip(ours, theirs, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
        assert a.updated


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_with_rates_that_a_float_holds_the_bits_are_the_same(precision: str) -> None:
    options = {"preset": "causal", "precision": precision, "lr": 2**-7}
    device, host = make(True, **options), make(False, **options)
    assert run(device, 12) == run(host, 12)
    assert_equal(state(device), state(host))
    assert device.scale == host.scale


def test_muon_with_rates_on_the_device() -> None:
    device, host = (make(b, muon_lr=2**-6, lr=2**-8, weight_decay=0.5) for b in (True, False))
    run(device, 3), run(host, 3)
    for name, ours in state(device).items():
        torch.testing.assert_close(ours, state(host)[name], rtol=1e-4, atol=1e-5)


@given(log_every=st.integers(1, 7), lead=st.integers(1, 5), stops=st.sets(st.integers(1, 16)))
@settings(max_examples=15)
def test_every_outcome_is_told_once_and_in_order(
    log_every: int, lead: int, stops: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_step, "LEAD", lead)
        step = make(preset="causal", lr=2**-7, log_every=log_every)
    told: list[Outcome] = []
    for i in range(1, 17):
        told += step.issue(i, 1.0)
        assert i - len(told) <= 2 * lead
        if i in stops:
            told += step.settle()
            assert len(told) == i
    told += step.settle()
    assert [o.step for o in told] == list(range(1, 17))
    assert [o.loss for o in told] == losses_of_the_host()


@cache
def losses_of_the_host() -> list[float]:
    step = make(False, preset="causal", lr=2**-7)
    return [o.loss for i in range(1, 17) for o in step.issue(i, 1.0)]


# --- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_failed_step_halts_the_run_there(optimizer: str, bad: float) -> None:
    step = make(optimizer=optimizer, weight_decay=0.1)
    run(step, 4)
    before = state(step)
    poison(step, lambda call: call == 1, bad)  # one bad gradient, then good ones that come too late
    outcomes = run(step, 9, first=5)
    assert (outcomes[0].step, outcomes[0].updated, outcomes[0].overflow) == (5, False, False)
    assert not math.isfinite(outcomes[0].grad_norm)
    assert_equal(state(step), before)
    assert int(step._step) == 4
    step.begin(4, skipped=0)  # from here it goes on as if nothing had been
    other = make(optimizer=optimizer, weight_decay=0.1)
    run(other, 4)
    assert run(step, 8, first=5) == run(other, 8, first=5)
    assert_equal(state(step), state(other))


def test_failed_steps_are_skipped_as_on_the_host() -> None:
    options = {"on_nan": "skip", "preset": "causal", "lr": 2**-7}
    device, host = make(True, **options), make(False, **options)
    for step in (device, host):
        poison(step, lambda call: call in (1, 4, 5, 9))
    ours, theirs = run(device, 12), run(host, 12)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.step, a.loss, a.updated) == (b.step, b.loss, b.updated)
    assert_equal(state(device), state(host))


@pytest.mark.parametrize("known", [0, 4])
def test_skipping_has_an_end(known: int) -> None:
    step = make(on_nan="skip", log_every=100)
    step.begin(0, skipped=known)
    poison(step, lambda call: True)
    run(step, 30)
    assert int(step._step) == MOST_SKIPPED - known


def test_what_runs_before_a_capture_leaves_no_trace() -> None:
    step = make(precision="fp16", on_nan="skip", weight_decay=0.1)
    run(step, 3)
    before, scale, log = state(step), step.scale, step._log[:-1].clone()
    step._halted.fill_(True)
    for _ in range(4):
        step.compute()
    step._halted.fill_(False)
    assert_equal(state(step), before)
    assert (step.scale, int(step._step), int(step._skipped)) == (scale, 3, 0)
    assert torch.equal(step._log[:-1], log)


# --- the loss scale ------------------------------------------------------------------------------


@given(good=st.lists(st.booleans(), min_size=1, max_size=40), interval=st.integers(1, 5))
@settings(max_examples=50)
def test_the_scale_follows_the_rule_of_torch(good: list[bool], interval: int) -> None:
    theirs, tracker = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_step, "GROWTH_STEPS", interval)
        step = STEP_FP16
        step.scale = LossScale(1024.0, 0)
        for g in good:
            flag = torch.tensor(g)
            overflow = step._adapt_scale(torch.tensor(2.0), flag, torch.tensor(True))
            found_inf = 1 - flag.float()
            torch._amp_update_scale_(theirs, tracker, found_inf, 2.0, 0.5, interval)
            assert float(step._scale) == float(theirs)
            assert int(step._good_steps) == int(tracker)
            assert bool(overflow) == (not g and float(theirs) >= 1.0)


STEP_FP16 = make(precision="fp16")


def test_overflows_are_those_of_the_host() -> None:
    options = {"preset": "causal", "precision": "fp16", "lr": 2**-7}
    device, host = make(True, **options), make(False, **options)
    for step in (device, host):
        step.scale = LossScale(2.0**14, 1998)
        poison(step, lambda call: call in (1, 2, 7), math.inf)
    assert run(device, 12) == run(host, 12)
    assert device.scale == host.scale == LossScale(2.0**11, 5)
    assert_equal(state(device), state(host))


def test_no_scale_mends_what_is_not_an_overflow() -> None:
    step = make(precision="fp16")
    step.scale = LossScale(1.0)
    poison(step, lambda call: True, math.inf)
    first = run(step, 2)[0]
    assert not first.overflow
    assert bool(step._halted)


# --- what a CUDA graph can hold ------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("resident", "on_nan"), [(True, "stop"), (False, "skip")])
@pytest.mark.usefixtures("meta_works")
def test_a_step_never_asks_the_host(
    preset: str, precision: str, resident: bool, on_nan: str
) -> None:
    device = MetaDevice("meta", precision, "for a test")
    options = {"preset": preset, "on_nan": on_nan, "micro_batch_size": 4, "weight_decay": 0.1}
    step = make(resident=resident, device=device, **options)
    for _ in range(2):  # the first makes the optimizer's state
        with OnDeviceOnly() as seen:
            step.compute()
    assert "aten.lift_fresh.default" not in seen.operations  # a constant of the host
    assert any("_fused_adamw_.tensor_lr" in name for name in seen.operations)
    assert "aten.embedding_dense_backward.default" in seen.operations


@pytest.mark.usefixtures("meta_works")
def test_this_check_finds_what_asks_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(device=MetaDevice("meta", "bf16", "for a test"))
    plain = step.model.loss

    def failing(error: str, ask: Callable[[torch.Tensor], object]) -> None:
        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ask(x)
            return plain(x, y)

        monkeypatch.setattr(step.model, "loss", loss)
        with pytest.raises((RuntimeError, AssertionError), match=error), OnDeviceOnly():
            step.compute()

    failing("item", lambda x: bool((x > 3).any()))
    failing("nonzero", lambda x: x[x > 3])
    failing("is on|has a tensor on", lambda x: torch.arange(3) + 1)


def test_a_capture_that_fails_leaves_an_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    step, other = make(), make()
    step._graphed, step._say = True, said.append

    def fail(compute: Callable[[], None]) -> None:
        assert step.optimizer.capturable
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "_warm_up", lambda compute: [compute() for _ in range(3)])
    monkeypatch.setattr(graph, "_capture", fail)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
    monkeypatch.setattr("torch.cuda.set_stream", lambda stream: None)
    assert run(step, 6) == run(other, 6)
    assert_equal(state(step), state(other))
    assert not step.optimizer.capturable
    assert said == [
        "steps run eagerly: capturing them as a CUDA graph failed "
        "(operation not permitted when stream is capturing)"
    ]


def test_what_runs_is_said() -> None:
    gpu, cpu = Device("cuda", "bf16", "for a test"), Device("cpu", "fp32", "for a test")
    assert device_step.runs_on_device(gpu, World())
    assert not device_step.runs_on_device(gpu, World(0, 2))
    assert not device_step.runs_on_device(cpu, World())
    assert device_step.about_steps(gpu).startswith("one CUDA graph")
    assert device_step.about_steps(cpu).startswith("eager")
    assert make().about == "eager, as asked; 1 MB of tokens on the GPU"
    assert make(False).about == "eager"
