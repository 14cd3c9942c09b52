"""One training step: its parts add up, a bad gradient changes nothing, memory is accounted for."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.config import TrainConfig
from tinylm.device import Device
from tinylm.distributed import World
from tinylm.errors import InputError, TrainingError
from tinylm.memory import size, window_bytes
from tinylm.model import Transformer
from tinylm.optim import Optimizer
from tinylm.step import LossScale, TrainStep

# Relative to the largest gradient of a parameter: what another order of summing may change.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
PRESETS = ["modern", "causal", "notebook"]


def make(preset: str = "modern", precision: str = "fp32", **options: Any) -> TrainStep:
    small = {"d_model": 16, "d_ff": 24, "n_heads": 2, "seq_len": 8, "steps": 5, "batch_size": 8}
    config = TrainConfig.from_preset(preset, **(small | options))
    config = replace(config, model=replace(config.model, vocab_size=30))
    model = Transformer(config.model)
    torch.manual_seed(0)
    for parameter in model.parameters():  # some begin at zero, and hide the gradients of others
        parameter.data += 0.05 * torch.randn_like(parameter)
    device = Device("cpu", precision, "for a test")
    return TrainStep(model, Optimizer(model, config), config, device)


def batch(step: TrainStep, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    shape = step.config.batch_size, step.config.seq_len + 1
    ids = np.random.default_rng(seed).integers(0, 30, shape)
    return ids[:, :-1], ids[:, 1:]


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    step._backward(*batch(step))
    return {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}


def state(step: TrainStep) -> dict[str, torch.Tensor]:
    tensors = step.model.state_dict() | step.optimizer.state_tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_parts_of_a_batch_add_up_to_its_gradient(preset: str, precision: str) -> None:
    whole = gradients(make(preset, precision))
    assert len(whole) == len(list(make(preset).model.parameters()))
    for micro in (1, 2, 4, 8):
        parts = gradients(make(preset, precision, micro_batch_size=micro))
        for name, gradient in whole.items():
            if name.endswith("qkv.bias"):
                continue  # the keys' part is zero but for rounding
            error = (parts[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= TOLERANCE[precision], (name, micro, float(error))
        if micro == 8:
            assert all(torch.equal(parts[name], whole[name]) for name in whole)


@given(windows=st.integers(1, 12), micro=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_any_division_gives_the_same_loss_or_is_refused(windows: int, micro: int) -> None:
    if windows % micro:
        with pytest.raises(InputError, match="not divisible by"):
            make(batch_size=windows, micro_batch_size=micro)
        return
    parts = make(batch_size=windows, micro_batch_size=micro)
    assert parts.micro_batch_size == micro
    loss = parts(*batch(parts), 1.0).loss
    whole = make(batch_size=windows)
    assert loss == pytest.approx(whole(*batch(whole), 1.0).loss, rel=1e-6)


def test_processes_have_to_divide_the_batch() -> None:
    step = make(batch_size=6)
    with pytest.raises(InputError, match="batch_size 6 is not divisible by 4 processes"):
        TrainStep(step.model, step.optimizer, step.config, step.device, World(0, 4))
    config = replace(step.config, micro_batch_size=2)
    with pytest.raises(InputError, match="the 3 windows of each of 2 processes"):
        TrainStep(step.model, step.optimizer, config, step.device, World(0, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, optimizer: str) -> None:
    step = make(optimizer=optimizer)
    step(*batch(step), 1.0)
    before = state(step)
    handle = step.model.blocks[0].norm1.weight.register_hook(lambda g: torch.full_like(g, bad))
    outcome = step(*batch(step, 1), 1.0)
    handle.remove()
    assert not outcome.updated
    assert not outcome.overflow
    after = state(step)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # And leaves nothing behind: the next step is that of a run which never saw it.
    other = make(optimizer=optimizer)
    other(*batch(other), 1.0)
    assert step(*batch(step, 2), 1.0) == other(*batch(other, 2), 1.0)
    assert all(torch.equal(a, state(other)[n]) for n, a in state(step).items())


def test_the_loss_scale_follows_overflows() -> None:
    scale = LossScale(value=8.0)
    for _ in range(1999):
        scale.adapt(True)
    assert scale == LossScale(8.0, 1999)
    scale.adapt(True)
    assert scale == LossScale(16.0, 0)
    scale.adapt(True)
    scale.adapt(False)
    assert scale == LossScale(8.0, 0)


def test_an_overflow_of_fp16_is_told_from_a_bad_gradient() -> None:
    step = make(precision="fp16")  # the arithmetic of a CPU does well enough for a test
    handle = step.model.norm.weight.register_hook(lambda g: torch.full_like(g, math.inf))
    assert step(*batch(step), 1.0).overflow
    assert step.scale.value == 32768.0
    step.scale.value = 1.0
    assert not step(*batch(step), 1.0).overflow  # no scale can mend this one
    handle.remove()
    step.scale.value = 1024.0
    plain = make()
    for seed in range(3):
        scaled, outcome = step(*batch(step, seed), 1.0), plain(*batch(plain, seed), 1.0)
        assert scaled.updated
        assert scaled.grad_norm == pytest.approx(outcome.grad_norm, rel=0.02)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__ + str(error)[:8],
)
def test_out_of_memory_says_what_takes_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise error

    step = make(batch_size=64, micro_batch_size=32, d_model=128, d_ff=384, seq_len=256)
    monkeypatch.setattr(step.model, "loss", full)
    with pytest.raises(TrainingError) as failure:
        step(*batch(step), 1.0)
    text = str(failure.value)
    assert "32 windows (of --batch-size 64) of 256 tokens (--seq-len) at once" in text
    parameters = step.model.parameter_count()
    assert f"about {size(16 * parameters)} for weights, gradients and optimizer" in text
    window = window_bytes(step.config.model, 256, step.device)
    assert f"{size(window)} for each window, {size(32 * window)} in all" in text
    assert "lower --micro-batch-size" in text


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    step = make()
    monkeypatch.setattr(step.model, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step(*batch(step), 1.0)


NO_MEMORY = """
import resource
import numpy as np
from test_step import make
from tinylm.errors import TrainingError
step = make(batch_size=4096, seq_len=256, d_model=64, n_layers=4)
ids = np.zeros((4096, 256), dtype=np.int64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
try:
    step(ids, ids, 1.0)
except TrainingError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_process_that_really_runs_out_of_memory() -> None:
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "out of memory with 4096 windows" in done.stdout, done.stderr


Saved = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_a_windows_memory(preset: str, precision: str) -> None:
    """Against the tensors that autograd keeps."""
    step = make(preset, precision, d_model=64, d_ff=160, n_heads=4, seq_len=32, batch_size=16)
    own = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    x = torch.from_numpy(batch(step)[0])
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t), step.device.autocast():
        h = step.model.hidden(x)
    measured = sum(kept.values()) / 16
    estimated = window_bytes(step.config.model, 32, step.device)
    assert h.requires_grad
    assert 0.7 < estimated / measured < 1.4
