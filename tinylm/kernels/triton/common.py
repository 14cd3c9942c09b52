"""What the kernels share: loads and stores of rows, and where and how a kernel is started."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.kernels.dispatch import decided_while_tracing

# Softmax in base 2: the hardware has exp2 and log2, and exp(x) is exp2(x · log2 e) anyway.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# For kernels of which, left to itself, the assembler of some capability or Triton spills some bytes
# to get down to the registers with which one more program would fit a processor.
MOST_REGISTERS = 255
# A finite stand-in for minus infinity: no row can turn into NaN.
MASKED = tl.constexpr(-1e30)

INTERPRETING = bool(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """How a kernel cuts up its work."""

    rows: int
    columns: int
    warps: int
    stages: int = 1

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@triton.jit
def load_rows(BASE, row, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``row`` of a matrix with ``rows`` rows, BLOCK wide; zero where there is nothing."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(BASE + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(BASE, row, rows, stride, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, rounded to the dtype of the matrix."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    address = BASE + row[:, None] * stride + column[None, :]
    tl.store(address, value.to(BASE.dtype.element_ty), mask=mask)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def capability(x: Tensor) -> tuple[int, int]:
    """Of the device of ``x``; the interpreter passes for the smallest one."""
    return _cuda_capability(x.device) if x.is_cuda else (7, 5)


@decided_while_tracing
def _cuda_capability(device: torch.device) -> tuple[int, int]:
    if override := triton.knobs.runtime.override_arch:
        # TRITON_OVERRIDE_ARCH=sm75: how the T4's path is tried on a newer GPU.
        return divmod(int("".join(c for c in override if c.isdigit())), 10)
    return torch.cuda.get_device_capability(device)


def processors(x: Tensor) -> int:
    """Of the device of ``x``; the interpreter passes for a very small one."""
    return _cuda_processors(x.device) if x.is_cuda else 3


@decided_while_tracing
def _cuda_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be that of their arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dense_last(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension has gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dtype_refusal(*tensors: Tensor) -> str | None:
    """Why kernels do not take these dtypes; None if they do."""
    for x in tensors:
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{x.dtype} is none of fp16, bf16 and fp32"
        if x.dtype == torch.bfloat16 and INTERPRETING:
            return "Triton's interpreter computes bf16 wrongly"
        if x.dtype == torch.bfloat16 and capability(x) < (8, 0):
            return "bf16 needs compute capability 8.0"
    return None


def matmul_refusal(x: Tensor) -> str | None:
    """Why no kernel with products of the dtype of ``x`` should run on its device."""
    if not x.is_cuda or capability(x) >= (8, 0):
        return None
    if capability(x) != (7, 5):
        return "Triton has no tensor cores below compute capability 7.5"
    if x.dtype != torch.float16:
        return f"compute capability 7.5 has no matrix instructions for {x.dtype}"
    from tinylm.kernels import turing

    return turing.refusal(x.device)
