"""Every implementation of every operator against its fp64 reference on the device at hand.

This is ``tinylm doctor --kernels``: errors of outputs and gradients, and the time of one forward
and backward pass. What it can run on a T4 is what there is to know about that T4.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinylm import kernels
from tinylm.kernels import dispatch

# Largest error of outputs and gradients, relative to the largest value, by dtype of the inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SECONDS = 0.2  # for the timing of one line


@dataclass(frozen=True)
class Case:
    """A call of an operator: ``run(backend, *tensors)`` gives one output."""

    operator: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]
    gradients: bool = True
    parameters: int = 0  # of the last inputs, which are fp32, as a norm's in the model


@dataclass(frozen=True)
class Result:
    """How one implementation did. ``refusal``: why it did not run, and torch did in its place."""

    case: Case
    implementation: str
    dtype: torch.dtype
    error: float
    milliseconds: float
    refusal: str | None
    chosen_because: str | None

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE[self.dtype]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        note = f"refused: {self.refusal}" if self.refusal else ""
        if self.chosen_because:
            note = f"{note}  " * bool(note) + f"runs here: {self.chosen_because}"
        return (
            f"{self.case.operator:21}{self.case.name:26}{dtype:9}{self.implementation:10}"
            f"{'ok' if self.ok else 'WRONG':6}error {self.error:.1e} of {TOLERANCE[self.dtype]:.0e}"
            f"{self.milliseconds:10.3f} ms  {note}"
        ).rstrip()


def check(device: torch.device) -> Iterator[Result]:
    """One result per operator, shape, dtype and implementation; the fp64 reference is the measure.

    On a CPU with ``TRITON_INTERPRET=1`` the Triton kernels take part in Triton's interpreter, on
    small shapes; their times mean nothing there.
    """
    interpreting = device.type == "cpu" and dispatch.triton_refusal("cpu") is None
    for case in cases(device.type, tiny=interpreting):
        for dtype in dtypes(device, interpreting):
            yield from _results(case, device, dtype)


def _results(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    names = dispatch.IMPLEMENTATIONS[case.operator]
    inputs = [randn(s, i).to(device, dtype) for i, s in enumerate(case.shapes)]
    for i in range(len(inputs) - case.parameters, len(inputs)):
        inputs[i] = inputs[i].float()
    out = case.run(names[-1], *inputs)
    dout = randn(out.shape, len(inputs)).to(device, out.dtype)
    expected = outputs(case, names[-1], [x.double() for x in inputs], dout)
    for name in names:
        if name != "triton" or dispatch.triton_refusal(device.type) is None:
            yield _result(case, name, inputs, dout, expected)


def _result(
    case: Case, name: str, inputs: list[Tensor], dout: Tensor, expected: list[Tensor]
) -> Result:
    device = dout.device
    with refusals() as refused:
        actual = outputs(case, name, inputs, dout)
    milliseconds = timed(lambda: outputs(case, name, inputs, dout), device)
    selection = dispatch.select(case.operator, device.type)
    return Result(
        case,
        name,
        inputs[0].dtype,
        max(relative_error(a, e) for a, e in zip(actual, expected, strict=True)),
        milliseconds,
        refused[0] if refused else None,
        selection.reason if selection.implementation == name else None,
    )


def dtypes(device: torch.device, interpreting: bool) -> list[torch.dtype]:
    if interpreting:
        return [torch.float32, torch.float16]  # it computes bf16 wrongly
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return [torch.float32, torch.float16] + [torch.bfloat16] * modern


def cases(device_type: str, tiny: bool) -> Iterator[Case]:
    """The shapes of the presets on a GPU, smaller ones on a CPU, the smallest when interpreted."""
    B, T, N, V = (1, 40, 40, 97) if tiny else (2, 100, 256, 2000)
    if device_type == "cuda":
        B, T, N, V = 16, 256, 4096, 10_000
    attention = kernels.causal_attention
    yield _attention("", B, 32, 32, 32, attention)
    yield _attention("", B, T, T, 32, attention)
    yield _attention("", B, T - 7, T - 7, 64, attention)
    start = torch.arange(T).div(T // 3, rounding_mode="floor").mul(T // 3)
    yield _attention(" documents", B, T, T, 32, partial(_within, start))
    yield _attention(" decoding", 2, 1, 4 * T, 32, attention, gradients=False)
    C, D = (24, 16) if tiny else (128, 32)
    vectors = (N, C), (C,), (C,)
    yield Case("layer_norm", f"N {N}, C {C}", vectors, _layer_norm, parameters=2)
    yield Case("rms_norm", f"N {N}, C {C}", vectors[:2], _rms_norm, parameters=1)
    head = (N, C), (V, C)
    yield Case("linear_cross_entropy", f"N {N}, V {V}", head, _cross_entropy)
    capped = partial(_cross_entropy, softcap=5.0, z_loss=1e-3)
    yield Case("linear_cross_entropy", f"N {N}, V {V} capped", head, capped)
    yield Case("rotary", f"T {T}, D {D}", ((B, 2, T, D),), partial(_rotary, T, D))


def _attention(
    name: str, B: int, T: int, S: int, D: int, run: Callable[..., Tensor], gradients: bool = True
) -> Case:
    heads = 4, 2  # grouped
    shapes = (B, heads[0], T, D), (B, heads[1], S, D), (B, heads[1], S, D)

    def call(backend: str, *qkv: Tensor) -> Tensor:
        return run(*qkv, backend=backend)

    size = f"T {T}" if T == S else f"S {S}"
    return Case("causal_attention", f"{size}, D {D}{name}", shapes, call, gradients)


def _within(start_T: Tensor, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return kernels.causal_attention(q, k, v, start_BT=start_T.to(q.device), backend=backend)


def _layer_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.layer_norm(x, weight, bias, backend=backend)


def _rms_norm(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return kernels.rms_norm(x, weight, backend=backend)


def _cross_entropy(backend: str, h: Tensor, weight: Tensor, **terms: Any) -> Tensor:
    targets = torch.arange(len(h), device=h.device) % len(weight)
    targets[::5] = -100
    weight = weight / 8  # exact, and logits are of a usual size
    return kernels.linear_cross_entropy(
        h, weight, targets, reduction="sum", backend=backend, **terms
    )


def _rotary(T: int, D: int, backend: str, x: Tensor) -> Tensor:
    cos, sin = (t.to(x) for t in kernels.rotary_tables(T, D, 10_000.0))
    return kernels.apply_rotary(x, cos, sin)


def randn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(case: Case, backend: str, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_(case.gradients) for x in inputs]
    out = case.run(backend, *inputs)
    if not case.gradients:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest, over the largest value; infinite if anything is not a finite number."""
    if not actual.isfinite().all():
        return float("inf")
    difference = (actual.double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-3))


@contextmanager
def refusals() -> Iterator[list[str]]:
    """What dispatch says inside about calls that a kernel did not take, instead of logging it."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage().split(": ", 1)[-1])

    handler, log = Collect(), dispatch.logger
    before, log.handlers = log.handlers, [handler]
    propagate, log.propagate = log.propagate, False
    dispatch._fall_back.cache_clear()
    try:
        yield found
    finally:
        log.handlers, log.propagate = before, propagate
        dispatch._fall_back.cache_clear()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a run, in the fastest of as many trials as fit into `SECONDS`."""
    repeats = 10 if device.type == "cuda" else 1

    def trial() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    best = trial()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, trial())
    return 1000 * best
