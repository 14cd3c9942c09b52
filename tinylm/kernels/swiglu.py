"""The gated activation of a feed-forward layer (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor

from tinylm.kernels.dispatch import (
    dtype_name,
    implementation,
    torch_instead,
    torch_instead_of_compiled,
)


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · value`` with ``x = (gate, value)`` along the last dimension.

    Args:
        backend: ``"triton"``, ``"c++"`` or ``"torch"``; chosen by device if None.
    """
    name = implementation("swiglu", x.device, backend, call_kind(x))
    if name == "triton":
        from tinylm.kernels.triton import swiglu as kernels

        refusal = kernels.refusal(x)
        if refusal is None:
            return kernels.swiglu(x)
        torch_instead("swiglu", x.device.type, refusal)
    elif name == "c++":
        from tinylm.kernels.compiled import swiglu as compiled
        from tinylm.kernels.compiled.common import numbers_refusal

        refusal = numbers_refusal(x)
        if refusal is None:
            out: Tensor = compiled.swiglu(x)
            return out
        torch_instead_of_compiled("swiglu", x.device.type, refusal, backend)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def call_kind(x: Tensor) -> str:
    """What the time of a call hangs on, for `tinylm.kernels.dispatch.select`."""
    return dtype_name(x.dtype)
