"""SwiGLU (Shazeer 2020) in one pass.

    out = gate s value      dvalue = dout gate s      dgate = dout value s (1 + gate (1 - s))

with s = sigmoid(gate). Only the input is kept for the gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.kernels.triton.common import (
    Tile,
    dense_last,
    dtype_refusal,
    on_device,
    power_of_two,
)

# Elements of a program's tile: four rows of 128, or more of fewer.
TILE_ELEMENTS, WIDEST_TILE = 512, 128


@triton.jit
def place(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows and columns of a program's tile, and which of its elements there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < WIDTH)


@triton.jit
def load_gated(address, present, WIDTH: tl.constexpr):
    """Gates, values, and sigmoids of the gates."""
    gate = tl.load(address, mask=present, other=0.0).to(tl.float32)
    value = tl.load(address + WIDTH, mask=present, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(gate))  # never too large
    return gate, value, tl.where(gate < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tinylm_swiglu_forward(
    X, OUT, rows, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row, column, present = place(rows, WIDTH, BLOCK, ROWS)
    gate, value, s = load_gated(X + row * x_row + column, present, WIDTH)
    out = (gate * s * value).to(OUT.dtype.element_ty)
    tl.store(OUT + row * WIDTH + column, out, mask=present)


@triton.jit
def tinylm_swiglu_backward(
    X, DOUT, DX, rows, x_row, dout_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, present = place(rows, WIDTH, BLOCK, ROWS)
    gate, value, s = load_gated(X + row * x_row + column, present, WIDTH)
    dout = tl.load(DOUT + row * dout_row + column, mask=present, other=0.0).to(tl.float32)
    dgate, dvalue = dout * value * s * (1.0 + gate * (1.0 - s)), dout * gate * s
    address = DX + row * 2 * WIDTH + column
    tl.store(address, dgate.to(DX.dtype.element_ty), mask=present)
    tl.store(address + WIDTH, dvalue.to(DX.dtype.element_ty), mask=present)


def tile_for(width: int) -> Tile:
    columns = min(power_of_two(width), WIDEST_TILE)
    return Tile(TILE_ELEMENTS // columns, columns, warps=4)


def _grid(rows: int, width: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns)


@torch.library.custom_op("tinylm::gated_forward", mutates_args=())
def gated_forward(x_NF: Tensor) -> Tensor:
    """silu(gate) value of rows (gate, value)."""
    out: Tensor = _gated_forward_output(x_NF)
    N, F = out.shape
    tile = tile_for(F)
    with on_device(x_NF):
        tinylm_swiglu_forward[_grid(N, F, tile)](
            x_NF, out, N, x_NF.stride(0),
            WIDTH=F, BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
        )  # fmt: skip
    return out


@gated_forward.register_fake
def _gated_forward_output(x_NF: Tensor) -> Tensor:
    return x_NF.new_empty(x_NF.shape[0], x_NF.shape[1] // 2)


@torch.library.custom_op("tinylm::gated_backward", mutates_args=())
def gated_backward(dout_NF: Tensor, x_NF: Tensor) -> Tensor:
    dx: Tensor = _gated_backward_output(dout_NF, x_NF)
    N, F = dout_NF.shape
    tile = tile_for(F)
    with on_device(x_NF):
        tinylm_swiglu_backward[_grid(N, F, tile)](
            x_NF, dout_NF, dx, N, x_NF.stride(0), dout_NF.stride(0),
            WIDTH=F, BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
        )  # fmt: skip
    return dx


@gated_backward.register_fake
def _gated_backward_output(dout_NF: Tensor, x_NF: Tensor) -> Tensor:
    return torch.empty_like(x_NF, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout_NF: Tensor) -> Tensor:
    dx: Tensor = gated_backward(dense_last(dout_NF), *ctx.saved_tensors)
    return dx


gated_forward.register_autograd(_backward, setup_context=_setup_context)


def swiglu(x: Tensor) -> Tensor:
    """For an input that `refusal` has nothing against."""
    out: Tensor = gated_forward(dense_last(x.reshape(-1, x.shape[-1])))
    return out.view(*x.shape[:-1], -1)


def refusal(x: Tensor) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    if why := dtype_refusal(x):
        return why
    if x.numel() == 0:
        return "empty input"
    return "a width that is odd" if x.shape[-1] % 2 else None
