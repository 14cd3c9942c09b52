"""Which implementation of each operator runs on which device, and why: one table, one place."""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tinylm.errors import InputError

ENVIRONMENT_VARIABLE = "TINYLM_KERNELS"


@dataclass(frozen=True)
class Selection:
    """What runs for one operator on one type of device."""

    operator: str
    implementation: str
    reason: str


# (operator, device type) -> what "auto" chooses. "*" stands for every other device.
# The reasons are measurements where there is a choice: at head dimension 32, SDPA's backward
# on a CPU takes about twice as long as two plain matrix products.
_AUTO: dict[tuple[str, str], tuple[str, str]] = {
    ("causal_attention", "cpu"): ("matmul", "faster than SDPA's backward at small head dimensions"),
    ("causal_attention", "*"): ("sdpa", "torch's fused attention"),
    ("layer_norm", "*"): ("torch", "torch's own layer norm"),
    ("rms_norm", "*"): ("torch", "plain torch, statistics in fp32"),
    ("linear_cross_entropy", "*"): ("chunked", "never holds all logits; least memory traffic"),
    ("rotary", "*"): ("torch", "plain torch"),
}

# Every implementation an operator has; the last is the plain reference.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "causal_attention": ("sdpa", "matmul"),
    "layer_norm": ("torch", "reference"),
    "rms_norm": ("torch",),
    "linear_cross_entropy": ("chunked", "reference"),
    "rotary": ("torch",),
}


@cache
def select(operator: str, device_type: str) -> Selection:
    """The implementation of ``operator`` for a device type, decided once per process.

    ``TINYLM_KERNELS=auto`` (or unset) takes the fastest known; ``reference`` takes the plain
    reference of every operator. Anything else raises `InputError`.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if setting == "reference":
        return Selection(
            operator, IMPLEMENTATIONS[operator][-1], f"{ENVIRONMENT_VARIABLE}=reference"
        )
    if setting != "auto":
        raise InputError(
            f"{ENVIRONMENT_VARIABLE} is {setting!r}; choose auto (the fastest) or reference"
        )
    name, reason = _AUTO.get((operator, device_type)) or _AUTO[(operator, "*")]
    return Selection(operator, name, reason)


def implementation(operator: str, device_type: str, backend: str | None) -> str:
    """``backend`` if given (checked), else what `select` chooses."""
    if backend is None:
        return select(operator, device_type).implementation
    if backend not in IMPLEMENTATIONS[operator]:
        known = ", ".join(IMPLEMENTATIONS[operator])
        raise InputError(f"{operator} has no backend {backend!r}; choose one of {known}")
    return backend


def selections(device_type: str) -> list[Selection]:
    """What runs for every operator on a device type, for ``tinylm doctor``."""
    return [select(operator, device_type) for operator in IMPLEMENTATIONS]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, statistics and softmax over ``x``: fp32, or fp64 where ``x`` is that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in its `statistics_dtype`."""
    return x.to(statistics_dtype(x))
