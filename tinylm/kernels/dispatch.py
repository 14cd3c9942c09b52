"""Which implementation of each operator runs on which device, and why: one table, one place."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from tinylm.errors import InputError

ENVIRONMENT_VARIABLE = "TINYLM_KERNELS"
SETTINGS = {
    "auto": "the fastest known",
    "triton": "the Triton kernels wherever they can run",
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
    """What runs for one operator on one type of device."""

    operator: str
    implementation: str
    reason: str


# (operator, device type) -> the torch implementation. "*" stands for every other device.
# The reasons are measurements where there is a choice.
_TORCH: dict[tuple[str, str], tuple[str, str]] = {
    ("causal_attention", "cpu"): ("blocked", "a third of SDPA's time at small head dimensions"),
    ("causal_attention", "*"): ("sdpa", "torch's fused attention"),
    ("layer_norm", "*"): ("torch", "torch's own layer norm"),
    ("rms_norm", "*"): ("torch", "few passes of plain torch, statistics in fp32"),
    ("linear_cross_entropy", "*"): ("chunked", "never holds all logits; least memory traffic"),
    ("rotary", "*"): ("torch", "plain torch"),
}
# Why "auto" does not choose the Triton kernels yet, where they could run.
_UNPROVEN = "no Triton kernel has run on a GPU yet, TINYLM_KERNELS=triton tries them"

# Every implementation an operator has; the last is the plain reference.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "causal_attention": ("triton", "sdpa", "blocked", "matmul"),
    "layer_norm": ("triton", "torch", "reference"),
    "rms_norm": ("triton", "torch", "reference"),
    "linear_cross_entropy": ("triton", "chunked", "reference"),
    "rotary": ("torch",),
}


@cache
def select(operator: str, device_type: str) -> Selection:
    """The implementation of ``operator`` for a device type, decided once per process.

    ``TINYLM_KERNELS`` is one of `SETTINGS`, ``auto`` if unset; anything else raises `InputError`.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if setting not in SETTINGS:
        known = ", ".join(f"{name} ({meaning})" for name, meaning in SETTINGS.items())
        raise InputError(f"{ENVIRONMENT_VARIABLE} is {setting!r}; choose one of {known}")
    own = IMPLEMENTATIONS[operator]
    if setting == "reference":
        return Selection(operator, own[-1], f"{ENVIRONMENT_VARIABLE}=reference")
    name, reason = _torch_choice(operator, device_type)
    if "triton" not in own or setting == "torch":
        return Selection(operator, name, reason)
    if setting == "triton":
        refusal = triton_refusal(device_type)
        if refusal is None:
            return Selection(operator, "triton", f"{ENVIRONMENT_VARIABLE}=triton")
        return Selection(operator, _fall_back(operator, name, refusal), f"{refusal}; {reason}")
    if device_type == "cuda" and triton_refusal(device_type) is None:
        reason = f"{reason}; {_UNPROVEN}"
    return Selection(operator, name, reason)


def _torch_choice(operator: str, device_type: str) -> tuple[str, str]:
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


@decided_while_tracing
def implementation(operator: str, device_type: str, backend: str | None) -> str:
    """``backend`` if given (checked), else what `select` chooses."""
    if backend is None:
        return select(operator, device_type).implementation
    if backend not in IMPLEMENTATIONS[operator]:
        known = ", ".join(IMPLEMENTATIONS[operator])
        raise InputError(f"{operator} has no backend {backend!r}; choose one of {known}")
    if backend == "triton" and (refusal := triton_refusal(device_type)):
        return torch_instead(operator, device_type, refusal)
    return backend


@decided_while_tracing
def torch_instead(operator: str, device_type: str, refusal: str) -> str:
    """The torch implementation, for a call that the Triton kernel refuses; says why, once."""
    return _fall_back(operator, _torch_choice(operator, device_type)[0], refusal)


@cache
def _fall_back(operator: str, name: str, refusal: str) -> str:
    logger.warning("%s runs as %s, not as a Triton kernel: %s", operator, name, refusal)
    return name


def selections(device_type: str) -> list[Selection]:
    """What runs for every operator on a device type, for ``tinylm doctor``."""
    return [select(operator, device_type) for operator in IMPLEMENTATIONS]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, statistics and softmax over ``x``: fp32, or fp64 where ``x`` is that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in its `statistics_dtype`."""
    return x.to(statistics_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``: autocast's if it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
