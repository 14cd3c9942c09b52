"""What the C++ kernels share."""

from typing import Any

import torch
from torch import Tensor

from tinylm import _C
from tinylm.errors import InputError
from tinylm.kernels.dispatch import decided_while_tracing, dtype_name

# Both sizes of a matrix that is multiplied whole come in blocks of so many.
MATRIX_STEP = 32

# What is summed over a vector's words of two bf16 comes in vectors of the processor's.
HEAD_DIM_STEP = 32


def numbers_refusal(x: Tensor) -> str | None:
    """Why no kernel here takes these numbers; None if one does."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return f"of {dtype_name(x.dtype)} on {x.device.type}; it takes bf16 and fp32 on a CPU"
    return None if x.numel() else "of nothing"


@decided_while_tracing
def products_refusal() -> str | None:
    """Why torch multiplies matrices of bf16 faster here; None if it does not."""
    faster: str | None = _C.faster_than_own_products()
    return faster


def require(holds: bool, what: str, *tensors: Tensor) -> None:
    if not holds:
        shapes = ", ".join(f"{tuple(x.shape)} in {dtype_name(x.dtype)}" for x in tensors)
        raise InputError(f"{what} of {shapes}: these do not belong together")


def named_kernel(name: str, x: Tensor | None = None) -> Any:
    return getattr(_C, name if x is None else f"{name}_{dtype_name(x.dtype)}")


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many vectors, and how long they are."""
    return x.numel() // max(x.shape[-1], 1), x.shape[-1]
