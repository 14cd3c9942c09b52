"""Every implementation of every operator against its fp64 reference on the device at hand.

This is ``tinylm doctor --kernels``: errors of outputs and gradients, and the time of one forward
and backward pass. Its quick form, only what decides which implementation runs, is what a GPU's
first use begins with (`tinylm.kernels.first_check`). As a program, ``python -m
tinylm.kernels.check cuda:0 full|quick SECONDS``, it prints one JSON object per result.
"""

import dataclasses
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.device import choose_device
from tinylm.kernels import dispatch
from tinylm.kernels.attention import call_kind as attention_kind
from tinylm.kernels.linear_cross_entropy import call_kind as cross_entropy_kind
from tinylm.kernels.muon import Matrix, MuonOptions
from tinylm.kernels.norm import call_kind as norm_kind
from tinylm.kernels.rotary import call_kind as norm_rotary_kind
from tinylm.kernels.swiglu import call_kind as swiglu_kind
from tinylm.kernels.table import Result

# Largest error of outputs and gradients, relative to the largest value, by dtype of the inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SECONDS = 0.2  # for the timing of what is compared


@dataclass(frozen=True)
class Case:
    """A call of an operator: ``run(backend, *tensors)`` gives one output."""

    operator: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]
    # Of the calls that this one's times decide about; None if it is there for its error only.
    kind: Callable[..., str] | None = None
    gradients: bool = True
    parameters: int = 0  # of the last inputs, which are fp32, as weights in the model
    fp32: bool = False  # the model calls it in fp32 too, whatever it is trained in


def check(device: torch.device, full: bool = True) -> Iterator[Result]:
    """One result per operator, shape, dtype and implementation; the fp64 reference is the measure.

    Unless ``full``, only of the Triton kernels and of what torch would run instead, in the dtypes
    that the model uses on this device. On a CPU with ``TRITON_INTERPRET=1`` the Triton kernels
    take part in Triton's interpreter, on small shapes; their times mean nothing there.
    """
    interpreting = device.type == "cpu" and dispatch.triton_refusal("cpu") is None
    trained = choose_device(str(device)).dtype
    for case in cases(device.type, interpreting):
        for dtype in dtypes(device, interpreting):
            if full or dtype == trained or (case.fp32 and dtype == torch.float32):
                yield from _results(case, device, dtype, full)


def _results(case: Case, device: torch.device, dtype: torch.dtype, full: bool) -> Iterator[Result]:
    every = dispatch.IMPLEMENTATIONS[case.operator]
    compared = "triton", dispatch.torch_choice(case.operator, device.type)[0]
    names = [name for name in every if full or name in compared]
    names = [name for name in names if dispatch.kernel_refusal(name, device.type) is None]
    inputs = [randn(s, i).to(device, dtype) for i, s in enumerate(case.shapes)]
    for i in range(len(inputs) - case.parameters, len(inputs)):
        inputs[i] = inputs[i].float()
    wide = [x.double() for x in inputs]
    dout = randn(case.run(every[-1], *wide).shape, len(inputs)).to(device, dtype)
    expected = outputs(case, every[-1], wide, dout)
    errors = {name: _error(case, name, inputs, dout, expected) for name in names}
    calls = {
        name: partial(outputs, case, name, inputs, dout)
        for name, (_, _, failure) in errors.items()
        if failure is None
    }
    with refusals():  # the results say them
        times = dict(zip(calls, timed(list(calls.values()), device), strict=True))
    kind = case.kind(*inputs) if case.kind is not None else ""
    for name, (error, refusal, failure) in errors.items():
        yield Result(
            operator=case.operator,
            case=case.name,
            kind=kind if name in compared else "",
            dtype=dispatch.dtype_name(dtype),
            implementation=name,
            error=error,
            tolerance=TOLERANCE[dtype],
            milliseconds=times.get(name, 0.0),
            refusal=refusal,
            failure=failure,
        )


def _error(
    case: Case, name: str, inputs: list[Tensor], dout: Tensor, expected: list[Tensor]
) -> tuple[float, str | None, str | None]:
    """The error, why the implementation did not run, and what else is wrong with it."""
    wrong = float("inf")
    try:
        with refusals() as refused, poisoned():
            actual, again = (outputs(case, name, inputs, dout) for _ in range(2))
    except Exception as raised:
        synchronize(dout.device)  # raises if the device is lost, and then all is
        what = " ".join(str(raised).split())[:100]
        return wrong, None, f"raised {type(raised).__name__}: {what}"
    refusal = refused[0] if refused else None
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    if error == wrong:
        return wrong, refusal, "not all values are finite"
    if name == "triton" and refusal is None and not all(map(torch.equal, actual, again)):
        return wrong, refusal, "another result when repeated"
    return error, refusal, None


def dtypes(device: torch.device, interpreting: bool) -> list[torch.dtype]:
    if interpreting:
        return [torch.float32, torch.float16]  # it computes bf16 wrongly
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return [torch.float32, torch.float16] + [torch.bfloat16] * modern


def cases(device_type: str, interpreting: bool) -> Iterator[Case]:
    """The kinds of calls there are, at shapes of the presets; smaller on a CPU.

    What a training step spends most in comes first: a check that is cut off has measured that.
    """
    gpu = device_type == "cuda"
    V = 10_000 if gpu else 97 if interpreting else 2000
    many, few = (4096, 512) if gpu else (40, 9) if interpreting else (256, 31)
    heads = (2, 1) if interpreting else (4, 4)
    yield _head(many, V, 128 if gpu else 24)
    for T, D in [(256, 64), (256, 32), (32, 32), (64, 64)] if gpu else [(100, 64), (32, 32)]:
        if not interpreting or D == 32:
            yield _attention(_batch(T, gpu), T, T, D, heads)
    C = 24 if interpreting else 128
    yield _norm("rms_norm", many, C)
    yield _norm("layer_norm", many, C)
    yield _norm("rms_norm", many // 2, 4, 32)
    small = (40, 3, 16) if interpreting else (100, 3, 32)
    for T, H, D in [(256, 4, 64), (32, 8, 32)] if gpu else [small]:
        yield _norm_rotary(_batch(T, gpu), T, H, D)
    yield _swiglu(many if gpu else few, 3 * C)
    yield _attention(2, 1, 1000 if gpu else 160, 32, heads)
    yield _attention(2, 1, 1000 if gpu else 160, 64, heads)
    T = 249 if gpu else 40 if interpreting else 100
    yield _attention(_batch(T, gpu), T, T, 32, heads, documents=True)
    yield _attention(_batch(T, gpu), T, T, 32, (4, 2), decides=False)  # grouped
    yield _head(many - 1, V, 128 if gpu else 24, softcap=5.0, z_loss=1e-3)
    if not interpreting:
        yield _head(few, V, 128)
    if gpu:
        yield _attention(_batch(T, gpu), T, T, 64, heads, documents=True)
        for D in (32, 64):
            yield _attention(_batch(D, gpu), D, D, D, heads, documents=True)
            yield _attention(_batch(D, gpu), D, D, D, (4, 2), decides=False)
            yield _attention(8, 1024, 1024, D, heads)
            yield _attention(8, 1024, 1024, D, heads, documents=True)
        yield _head(many, V, 256)
        yield _head(many, 2000, 128)
        yield _norm("rms_norm", many, 512)
        yield _norm("layer_norm", many, 512)
        yield _attention(_batch(T, gpu), T, T, 128, heads)
        yield _attention(8, 1024, 1024, 128, heads)
        yield _norm_rotary(_batch(T, gpu), T, 4, 128)
    T, D = (40, 16) if interpreting else (100, 32)
    yield Case("rotary", f"T {T}, D {D}", ((2, 2, T, D),), partial(_rotary, T, D))
    yield from _layers(few)
    yield Case("muon", "3 of 128 x 128", ((384, 128),) * 2, _muon, gradients=False)


def _layers(N: int) -> Iterator[Case]:
    """Weights times rows, with what stands around them."""
    x, norm, C, F = (N, 64), (64,), 64, 192
    yield Case("norm_linear", f"N {N}, C {C}", (x, norm, (96, C)), _norm_linear, parameters=2)
    yield Case("linear_residual", f"N {N}, C {C}", (x, (C, 96), (N, 96)), _linear_residual)
    weights = (2 * F, C), (C, F)
    yield Case(
        "feed_forward", f"N {N}, C {C}, F {F}", (x, norm, *weights), _feed_forward, parameters=3
    )


def training_cases() -> list[Case]:
    """What a training step of ``modern`` and ``causal`` spends its time in, at their shapes."""
    cases = [_head(1024, 10_000, 128)]  # of fewer rows than theirs: in fp64 they take long
    for preset in ("modern", "causal"):
        run = TrainConfig.from_preset(preset)
        B, T, model = run.batch_size, run.seq_len, run.model
        cases.append(_attention(B, T, T, model.head_dim, (model.n_heads, model.kv_heads)))
        cases.append(_norm(f"{model.norm}_norm", B * T, model.d_model))
    return cases


def all_implementations(case: Case, device: torch.device, dtype: torch.dtype) -> list[Result]:
    """The error and time of every implementation that can run on the device."""
    return list(_results(case, device, dtype, full=True))


def _batch(T: int, gpu: bool) -> int:
    """Sequences that make about as many tokens as a training step has."""
    return 4096 // T if gpu else 2


def _attention(
    B: int, T: int, S: int, D: int, heads: tuple[int, int], *, documents: bool = False,
    decides: bool = True,
) -> Case:  # fmt: skip
    def start_BT(device: torch.device) -> Tensor | None:
        if not documents:
            return None
        return torch.arange(T, device=device).div(T // 3 + 1, rounding_mode="floor").mul(T // 3 + 1)

    def call(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.causal_attention(q, k, v, start_BT=start_BT(q.device), backend=backend)

    def kind(q: Tensor, k: Tensor, v: Tensor) -> str:
        return attention_kind(q, k, start_BT(q.device))

    shapes = (B, heads[0], T, D), (B, heads[1], S, D), (B, heads[1], S, D)
    name = f"T {T}, " * (T == S) + f"S {S}, " * (T < S) + f"D {D}"
    name += ", grouped" * (heads[0] != heads[1]) + ", documents" * documents
    deciding = kind if decides else None
    return Case("causal_attention", name, shapes, call, deciding, gradients=T == S, fp32=T < S)


def _norm(operator: str, N: int, *shape: int) -> Case:
    layer = operator == "layer_norm"
    run = _layer_norm if layer else _rms_norm
    shapes = ((N, *shape), shape, shape)[: 3 if layer else 2]
    name = f"N {N}, C {shape[-1]}" + ", heads" * (len(shape) > 1)

    def kind(x: Tensor, weight: Tensor, *bias: Tensor) -> str:
        return norm_kind(x, weight)

    return Case(operator, name, shapes, run, kind, parameters=2 if layer else 1, fp32=True)


def _layer_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.layer_norm(x, weight, bias, backend=backend)


def _rms_norm(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return kernels.rms_norm(x, weight, backend=backend)


def _head(N: int, V: int, C: int, **terms: Any) -> Case:
    name = f"N {N}, V {V}, C {C}" + ", capped" * bool(terms)
    kind = None if terms else cross_entropy_kind
    run = partial(_cross_entropy, **terms)
    return Case("linear_cross_entropy", name, ((N, C), (V, C)), run, kind, parameters=1)


def _cross_entropy(backend: str, h: Tensor, weight: Tensor, **terms: Any) -> Tensor:
    targets = torch.arange(len(h), device=h.device) % len(weight)
    targets[::5] = -100
    weight = weight / 8  # exact, and logits are of a usual size
    return kernels.linear_cross_entropy(
        h, weight, targets, reduction="sum", backend=backend, **terms
    )


def _muon(backend: str, gradient: Tensor, momentum: Tensor) -> Tensor:
    """The change of a weight, in products of bf16 if the inputs are that, else as in training."""
    exact = dispatch.wide(gradient)
    matrix = Matrix(torch.zeros_like(exact), exact, dispatch.wide(momentum).clone(), 3)
    dtype = gradient.dtype if gradient.dtype == torch.bfloat16 else exact.dtype
    kernels.muon_step([matrix], MuonOptions(lr=1.0, dtype=dtype), backend=backend)
    return matrix.weight


def _rotary(T: int, D: int, backend: str, x: Tensor) -> Tensor:
    cos, sin = (t.to(x) for t in kernels.rotary_tables(T, D, 10_000.0))
    return kernels.apply_rotary(x, cos, sin)


def _norm_rotary(B: int, T: int, H: int, D: int) -> Case:
    def run(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        cos, sin = (t.to(x.device) for t in kernels.rotary_tables(T, D, 10_000.0))
        return kernels.norm_rotary(x, weight, cos, sin, backend=backend)

    def kind(x: Tensor, weight: Tensor) -> str:
        return norm_rotary_kind(x)

    shapes = (B, T, H, D), (H, D)
    return Case("norm_rotary", f"T {T}, D {D}", shapes, run, kind, parameters=1, fp32=True)


def _swiglu(N: int, F: int) -> Case:
    def run(backend: str, x: Tensor) -> Tensor:
        return kernels.swiglu(x, backend=backend)

    return Case("swiglu", f"N {N}, F {F}", ((N, 2 * F),), run, swiglu_kind, fp32=True)


def _norm_linear(backend: str, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Products in the dtype of x, which is in fp32, as in the model."""
    with _products(x):
        return kernels.norm_linear(dispatch.wide(x), norm, weight / 8, backend=backend)


def _linear_residual(backend: str, x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """The same; weights are exact in its dtype."""
    with _products(x):
        wide = dispatch.wide(x), a, dispatch.wide(weight) / 8
        return kernels.linear_residual(*wide, backend=backend)


def _products(x: Tensor) -> torch.autocast:
    return torch.autocast(
        x.device.type, x.dtype, enabled=x.dtype in (torch.float16, torch.bfloat16)
    )


def _feed_forward(backend: str, x: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Products in the dtype of x, the sum in fp32, as in the model."""
    inputs = dispatch.wide(x), norm, up / 8, down / 16  # exact, and sums are of a usual size
    with _products(x):
        return kernels.feed_forward(*inputs, backend=backend)


def randn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(case: Case, backend: str | None, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
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
def poisoned() -> Iterator[None]:
    """Within it every new tensor holds NaN until it is written, so that gaps show."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is not deterministic, and need not be
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


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


def timed(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds of each run, in the fastest of its trials, which take turns for `SECONDS`."""
    trial = _gpu_milliseconds if device.type == "cuda" else _milliseconds
    best = [trial(run) for run in runs]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = [min(b, trial(run)) for b, run in zip(best, runs, strict=True)]
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def _gpu_milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Of the GPU alone: it is kept waiting until all is queued, so no launch is waited for."""
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    queueing = repeats * (time.perf_counter() - begin)
    torch.cuda._sleep(int(2e9 * min(queueing, SECONDS)))  # type: ignore[no-untyped-call]  # cycles
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(device: str, extent: str, seconds: str) -> None:
    if hasattr(signal, "alarm"):  # should the process that waits for this one be gone
        signal.alarm(int(float(seconds)) + 10)
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    for result in check(where, full=extent == "full"):
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
