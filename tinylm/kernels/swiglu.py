"""The gated activation of a feed-forward layer (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor

from tinylm.kernels.dispatch import implementation, torch_instead_of_compiled


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · value`` with ``x = (gate, value)`` along the last dimension.

    Args:
        backend: ``"c++"`` or ``"torch"``; chosen by device if None.
    """
    if implementation("swiglu", x.device, backend) == "c++":
        from tinylm.kernels.compiled import swiglu as compiled
        from tinylm.kernels.compiled.common import numbers_refusal

        refusal = numbers_refusal(x)
        if refusal is None:
            out: Tensor = compiled.swiglu(x)
            return out
        torch_instead_of_compiled("swiglu", x.device.type, refusal, backend)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
