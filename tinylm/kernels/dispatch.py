"""Which implementation of each operator runs on which device, and why: one table, one place."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.kernels.table import Choice, remembered

ENVIRONMENT_VARIABLE = "TINYLM_KERNELS"
SETTINGS = {
    "auto": "on a GPU what its own check found right and fastest, on a CPU C++, else torch",
    "triton": "the Triton kernels wherever they can run",
    "c++": "the C++ kernels wherever they can run",
    "torch": "the best of plain torch",
    "reference": "the plain references",
}

logger = logging.getLogger("tinylm")
F = TypeVar("F", bound=Callable[..., Any])


def decided_while_tracing(function: F) -> F:
    """Lets torch.compile call ``function`` as it is, and takes what it returns as fixed.

    This is ``torch.compiler.assume_constant_result``, which would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Selection:
    """What runs for one operator on one device, for all calls or for those of a kind."""

    operator: str
    implementation: str
    reason: str
    kind: str = ""


# (operator, device type) -> the torch implementation. "*" stands for every other device.
# The reasons are measurements where there is a choice.
_TORCH: dict[tuple[str, str], tuple[str, str]] = {
    ("causal_attention", "cpu"): ("blocked", "a third of SDPA's time at small head dimensions"),
    ("causal_attention", "*"): ("sdpa", "torch's fused attention"),
    ("layer_norm", "*"): ("torch", "torch's own layer norm"),
    ("rms_norm", "*"): ("torch", "few passes of plain torch, statistics in fp32"),
    ("linear_cross_entropy", "*"): ("chunked", "never holds all logits; least memory traffic"),
    ("linear_residual", "*"): ("separate", "product, then sum"),
    ("norm_linear", "*"): ("separate", "rms_norm, then product"),
    ("norm_rotary", "*"): ("separate", "rms_norm, then rotary"),
    ("feed_forward", "*"): ("separate", "norm, products and swiglu, one after the other"),
    ("muon", "*"): ("torch", "matrices of equal shape together"),
    ("rotary", "*"): ("torch", "plain torch"),
    ("swiglu", "*"): ("torch", "plain torch"),
}
# What the C++ kernels take on a CPU; other calls run as the torch implementation does.
_COMPILED = {
    "causal_attention": "training in bf16, scores in cache",
    "feed_forward": "in bf16, one pass from the norm to the sum",
    "linear_cross_entropy": "without softcap",
    "linear_residual": "in bf16, the sum made with the product",
    "muon": "in bf16, each matrix in cache from gradient to update",
    "norm_linear": "in bf16, what is normalised stays in cache",
    "norm_rotary": "one pass in bf16 and fp32",
    "rms_norm": "one pass in bf16 and fp32",
    "swiglu": "one pass in bf16 and fp32",
}
# Why "auto" does not choose a Triton kernel, where nothing was measured.
_UNCHECKED = "the Triton kernels are not checked on this GPU yet, tinylm doctor --kernels does it"
_OTHER_KIND = "the check on this GPU measured no such call"

# Every implementation an operator has; the last is the plain reference.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "causal_attention": ("triton", "c++", "sdpa", "blocked", "matmul"),
    "layer_norm": ("triton", "torch", "reference"),
    "rms_norm": ("triton", "c++", "torch", "reference"),
    "linear_cross_entropy": ("triton", "c++", "chunked", "reference"),
    "feed_forward": ("c++", "separate"),
    "linear_residual": ("c++", "separate"),
    "muon": ("c++", "torch"),
    "norm_linear": ("c++", "separate"),
    "norm_rotary": ("triton", "c++", "separate"),
    "rotary": ("torch",),
    "swiglu": ("triton", "c++", "torch"),
}


def setting() -> str:
    """``TINYLM_KERNELS``: one of `SETTINGS`, ``auto`` if unset; else raises `InputError`."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if value not in SETTINGS:
        known = ", ".join(f"{name} ({meaning})" for name, meaning in SETTINGS.items())
        raise InputError(f"{ENVIRONMENT_VARIABLE} is {value!r}; choose one of {known}")
    return value


@cache
def select(operator: str, device: str, kind: str = "") -> Selection:
    """The implementation of ``operator`` on a device, decided once per process.

    ``auto`` on a GPU decides by kind of call: what its time hangs on, in words, such as
    ``fp16, T <= 64, D <= 32``. Each operator's ``call_kind`` says it, and the table of what was
    measured on that GPU is looked up by it (`tinylm.kernels.table`).
    """
    asked, device_type = setting(), torch.device(device).type
    own = IMPLEMENTATIONS[operator]
    if asked == "reference":
        return Selection(operator, own[-1], f"{ENVIRONMENT_VARIABLE}=reference", kind)
    name, reason = torch_choice(operator, device_type)
    if "c++" in own and (asked == "c++" or (asked == "auto" and device_type == "cpu")):
        return _in_cpp(operator, device_type, kind, asked)
    if asked == "auto" and device_type != "cuda":
        return Selection(operator, name, reason, kind)
    if "triton" not in own or asked in ("torch", "c++"):
        return Selection(operator, name, reason, kind)
    refusal = triton_refusal(device_type)
    if refusal is None and asked == "triton":
        return Selection(operator, "triton", f"{ENVIRONMENT_VARIABLE}=triton", kind)
    if asked == "triton":
        _fall_back(operator, name, str(refusal))
    if refusal is not None:
        return Selection(operator, name, f"{refusal}; {reason}", kind)
    choice = _measured(operator, torch.device(device), kind)
    return Selection(operator, "triton" if choice.triton else name, choice.reason, kind)


def _in_cpp(operator: str, device_type: str, kind: str, asked: str) -> Selection:
    name, reason = torch_choice(operator, device_type)
    refusal = compiled_refusal(device_type)
    if refusal is None:
        refusal, what = _in_products(operator)
    if refusal is None:
        return Selection(operator, "c++", f"{what}; else {name}", kind)
    if asked == "c++":
        _fall_back(operator, name, refusal, "in C++")
    return Selection(operator, name, f"{refusal}; {reason}", kind)


def _in_products(operator: str) -> tuple[str | None, str]:
    """Why no C++ kernel of the operator runs on this processor, and what those that do take.

    Some rest on products of whole matrices of bf16, which torch may do faster: these are left to
    it, and the cross-entropy only has it multiply.
    """
    from tinylm.kernels.compiled.common import products_refusal

    refusal, what = products_refusal(), _COMPILED[operator]
    if operator in ("feed_forward", "linear_residual", "muon", "norm_linear"):
        return refusal, what
    if operator == "linear_cross_entropy":
        what += f", logits in parts as {refusal}" if refusal else ", in bf16 no logits in memory"
    return None, what


def _measured(operator: str, device: torch.device, kind: str) -> Choice:
    table = remembered(device)
    if table is None:
        return Choice(False, _UNCHECKED)
    if table.failure is not None:
        return Choice(False, table.failure)
    missing = Choice(False, table.unfinished or _OTHER_KIND)
    return table.choices.get((operator, kind), missing)


def forget() -> None:
    """Decides anew, by what is remembered and asked for now."""
    for decision in (select, triton_refusal, compiled_refusal, _fall_back):
        decision.cache_clear()


def torch_choice(operator: str, device_type: str) -> tuple[str, str]:
    """The implementation in plain torch that a device type gets, and why."""
    return _TORCH.get((operator, device_type)) or _TORCH[(operator, "*")]


@cache
def triton_refusal(device_type: str) -> str | None:
    """Why no Triton kernel can run on a device type; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    import triton

    # The interpreter, for tests: TRITON_INTERPRET=1 when a kernel's file is first imported.
    return None if triton.knobs.runtime.interpret else "Triton needs a CUDA device"


@cache
def compiled_refusal(device_type: str) -> str | None:
    """Why no C++ kernel can run on a device type; None if they can."""
    if device_type != "cpu":
        return "the C++ kernels need a CPU"
    try:
        import tinylm._C  # noqa: F401
    except ImportError as error:
        return f"the compiled extension does not import ({error})"
    return None


def kernel_refusal(name: str, device_type: str) -> str | None:
    """Why an implementation cannot run on a device type; None if it can, as all in torch."""
    refusals = {"triton": triton_refusal, "c++": compiled_refusal}
    return refusals[name](device_type) if name in refusals else None


@decided_while_tracing
def implementation(operator: str, device: torch.device, backend: str | None, kind: str = "") -> str:
    """``backend`` if given (checked), else what `select` chooses for calls of a kind."""
    if backend is None:
        return select(operator, str(device), kind).implementation
    if backend not in IMPLEMENTATIONS[operator]:
        known = ", ".join(IMPLEMENTATIONS[operator])
        raise InputError(f"{operator} has no backend {backend!r}; choose one of {known}")
    if backend == "triton" and (refusal := triton_refusal(device.type)):
        return torch_instead(operator, device.type, refusal)
    if backend == "c++" and (refusal := compiled_refusal(device.type)):
        return torch_instead_of_compiled(operator, device.type, refusal, backend)
    return backend


@decided_while_tracing
def torch_instead(operator: str, device_type: str, refusal: str) -> str:
    """The torch implementation, for a call that the Triton kernel refuses; says why, once."""
    return _fall_back(operator, torch_choice(operator, device_type)[0], refusal)


@decided_while_tracing
def torch_instead_of_compiled(
    operator: str, device_type: str, refusal: str, backend: str | None
) -> str:
    """The same for a call that the C++ kernel refuses; says so where C++ was asked for.

    Otherwise it is the rule of what runs on a CPU, as `select` gives it.
    """
    name = torch_choice(operator, device_type)[0]
    asked = backend == "c++" or setting() == "c++"
    return _fall_back(operator, name, refusal, "in C++") if asked else name


@cache
def _fall_back(operator: str, name: str, refusal: str, kernel: str = "as a Triton kernel") -> str:
    logger.warning("%s runs as %s, not %s: %s", operator, name, kernel, refusal)
    return name


def selections(device: str) -> list[Selection]:
    """What runs for every operator on a device, by kind of call where that was measured."""
    table = remembered(torch.device(device)) if _decides_by_kind(device) else None
    kinds: dict[str, list[str]] = {}
    for operator, kind in table.choices if table else ():
        kinds.setdefault(operator, []).append(kind)
    return [
        select(operator, device, kind)
        for operator in IMPLEMENTATIONS
        for kind in kinds.get(operator, [""])
    ]


def fingerprint(device: str) -> str:
    """The same where the same implementations run: their results agree bit for bit, if at all."""
    chosen = [(s.operator, s.kind, s.implementation) for s in selections(device)]
    return blake2b(repr(chosen).encode(), digest_size=4).hexdigest()


def _decides_by_kind(device: str) -> bool:
    return setting() == "auto" and torch.device(device).type == "cuda"


_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def dtype_name(dtype: torch.dtype) -> str:
    """``fp16``, ``bf16``, ``fp32``, else torch's own name."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


def at_most(name: str, value: int, *limits: int) -> str:
    """``value`` among ``limits`` in words: ``D <= 32``, ``D > 128``."""
    for limit in limits:
        if value <= limit:
            return f"{name} <= {limit}"
    return f"{name} > {limits[-1]}"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, statistics and softmax over ``x``: fp32, or fp64 where ``x`` is that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in its `statistics_dtype`."""
    return x.to(statistics_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``: autocast's if it is on, else its own.

    As in torch, autocast leaves fp64 alone.
    """
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def check_devices(operator: str, first: Tensor, *others: Tensor | None) -> None:
    """Raises `InputError` unless all tensors are on one device."""
    for x in others:
        if x is not None and x.device != first.device:
            raise InputError(
                f"{operator} of tensors on {first.device} and {x.device}: needs them on one device"
            )
