"""Layer norm (Ba et al. 2016) and RMS norm (Zhang and Sennrich 2019) in one pass over the rows.

    u = x + residual      x̂ = (u - mean) rstd          out = x̂ weight + bias
    g = dout weight       du = rstd (g - x̂ mean(g x̂) - mean(g)) + dsum
    dweight = Σ dout x̂    dbias = Σ dout               (RMS norm: no mean, no bias)

The sums over rows are split between programs, each of which keeps its share in registers and
writes it once; torch adds the shares. Each row is read once in either direction.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.kernels.triton.common import (
    MOST_REGISTERS,
    Tile,
    dtype_refusal,
    load_rows,
    on_device,
    power_of_two,
    processors,
    store_rows,
)

WIDEST = 4096
# Elements of a program's tile: eight rows of 128. More do not fit into the registers.
TILE_ELEMENTS = 1024


@triton.jit
def tinylm_norm_forward(
    X, RESIDUAL, WEIGHT, BIAS, OUT, SUM, MEAN, RSTD, rows, x_row, residual_row, eps,
    RMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program. RESIDUAL and BIAS may be None, and then SUM is not written."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x = load_rows(X, row, rows, x_row, WIDTH, BLOCK)
    if RESIDUAL is not None:
        residual = load_rows(RESIDUAL, row, rows, residual_row, WIDTH, BLOCK)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(SUM.dtype.element_ty)
        store_rows(SUM, row, rows, WIDTH, x, WIDTH, BLOCK)
    x = x.to(tl.float32)
    if not RMS:
        mean = tl.sum(x, 1) / WIDTH
        tl.store(MEAN + row, mean, mask=row < rows)
        x = tl.where((column < WIDTH)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = x * rstd[:, None] * weight[None, :]
    if BIAS is not None:
        bias = tl.load(BIAS + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        out += bias[None, :]
    store_rows(OUT, row, rows, WIDTH, out, WIDTH, BLOCK)


@triton.jit
def tinylm_norm_backward(
    U, WEIGHT, MEAN, RSTD, DOUT, DSUM, DU, DWEIGHT, DBIAS, rows, tiles, u_row, dout_row, dsum_row,
    RMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``tiles`` tiles of ROWS rows per program, and its share of the sums over rows."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        u = load_rows(U, row, rows, u_row, WIDTH, BLOCK).to(tl.float32)
        dout = load_rows(DOUT, row, rows, dout_row, WIDTH, BLOCK).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        if not RMS:
            u -= tl.load(MEAN + row, mask=row < rows, other=0.0)[:, None]
            u = tl.where((column < WIDTH)[None, :], u, 0.0)
        normal = u * rstd[:, None]
        g = dout * weight[None, :]
        du = g - normal * (tl.sum(g * normal, 1) / WIDTH)[:, None]
        if not RMS:
            du -= (tl.sum(g, 1) / WIDTH)[:, None]
        du *= rstd[:, None]
        if DSUM is not None:
            du += load_rows(DSUM, row, rows, dsum_row, WIDTH, BLOCK).to(tl.float32)
        store_rows(DU, row, rows, WIDTH, du, WIDTH, BLOCK)
        dweight += tl.sum(dout * normal, 0)
        dbias += tl.sum(dout, 0)
    tl.store(DWEIGHT + program * WIDTH + column, dweight, mask=column < WIDTH)
    if DBIAS is not None:
        tl.store(DBIAS + program * WIDTH + column, dbias, mask=column < WIDTH)


def tile_for(width: int) -> Tile:
    block = power_of_two(width)
    return Tile(max(1, TILE_ELEMENTS // block), block, warps=4 if block <= 1024 else 8)


def programs_for(x: Tensor, tiles: int) -> int:
    """Programs of the backward pass: enough to fill the device, few enough to add up quickly."""
    return min(tiles, 4 * processors(x))


@torch.library.custom_op("tinylm::norm_forward", mutates_args=())
def norm_forward(
    x_NC: Tensor, residual_NC: Tensor | None, weight_C: Tensor, bias_C: Tensor | None,
    eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out_NC, sum_NC, mean_N, rstd_N); the sum is empty without a residual, the mean for RMS."""
    out, total, mean, rstd = _norm_forward_outputs(x_NC, residual_NC, rms)
    tile = tile_for(x_NC.shape[1])
    with on_device(x_NC):
        tinylm_norm_forward[(triton.cdiv(x_NC.shape[0], tile.rows),)](
            x_NC, residual_NC, weight_C, bias_C, out, total, mean, rstd, x_NC.shape[0],
            x_NC.stride(0), 0 if residual_NC is None else residual_NC.stride(0), eps,
            RMS=rms, WIDTH=x_NC.shape[1], BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
        )  # fmt: skip
    return out, total, mean, rstd


def _norm_forward_outputs(
    x_NC: Tensor, residual_NC: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, C = x_NC.shape
    dtype = x_NC.dtype
    if residual_NC is not None:
        dtype = torch.promote_types(dtype, residual_NC.dtype)
    out = x_NC.new_empty(N, C, dtype=dtype)
    total = x_NC.new_empty((0,) if residual_NC is None else (N, C), dtype=dtype)
    mean = x_NC.new_empty(0 if rms else N, dtype=torch.float32)
    return out, total, mean, x_NC.new_empty(N, dtype=torch.float32)


@torch.library.custom_op("tinylm::norm_backward", mutates_args=())
def norm_backward(
    dout_NC: Tensor, dsum_NC: Tensor | None, u_NC: Tensor, weight_C: Tensor, mean_N: Tensor,
    rstd_N: Tensor, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(du_NC, dweight_C, dbias_C) in fp32 where they are sums over rows; no dbias for RMS."""
    N, C = u_NC.shape
    tile = tile_for(C)
    tiles = triton.cdiv(N, tile.rows)
    programs = programs_for(u_NC, tiles)
    du_NC = torch.empty_like(u_NC, memory_format=torch.contiguous_format)
    dweight_PC = u_NC.new_empty(programs, C, dtype=torch.float32)
    dbias_PC = None if rms else torch.empty_like(dweight_PC)
    with on_device(u_NC):
        tinylm_norm_backward[(programs,)](
            u_NC, weight_C, mean_N, rstd_N, dout_NC, dsum_NC, du_NC, dweight_PC, dbias_PC,
            N, triton.cdiv(tiles, programs),
            u_NC.stride(0), dout_NC.stride(0), 0 if dsum_NC is None else dsum_NC.stride(0),
            RMS=rms, WIDTH=C, BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
            maxnreg=MOST_REGISTERS if C > 512 else None,
        )  # fmt: skip
    dbias_C = u_NC.new_empty(0, dtype=torch.float32) if dbias_PC is None else dbias_PC.sum(0)
    return du_NC, dweight_PC.sum(0), dbias_C


@norm_forward.register_fake
def _(
    x_NC: Tensor, residual_NC: Tensor | None, weight_C: Tensor, bias_C: Tensor | None,
    eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _norm_forward_outputs(x_NC, residual_NC, rms)


@norm_backward.register_fake
def _(
    dout_NC: Tensor, dsum_NC: Tensor | None, u_NC: Tensor, weight_C: Tensor, mean_N: Tensor,
    rstd_N: Tensor, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    C = u_NC.shape[1]
    du_NC = torch.empty_like(u_NC, memory_format=torch.contiguous_format)
    sums = u_NC.new_empty(C, dtype=torch.float32)
    return du_NC, sums, u_NC.new_empty(0 if rms else C, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_NC, residual_NC, weight_C, bias_C, _, ctx.rms = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x_NC if residual_NC is None else total, weight_C, mean, rstd)
    ctx.x_dtype = x_NC.dtype
    ctx.residual_dtype = None if residual_NC is None else residual_NC.dtype
    ctx.bias_dtype = None if bias_C is None else bias_C.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dsum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None and (dsum is None or ctx.residual_dtype is None):
        return (None,) * 6
    u_NC, weight_C, mean_N, rstd_N = ctx.saved_tensors
    dout = torch.zeros_like(u_NC) if dout is None else _rows(dout)
    dsum = None if dsum is None or ctx.residual_dtype is None else _rows(dsum)
    du, dweight, dbias = norm_backward(dout, dsum, u_NC, weight_C, mean_N, rstd_N, ctx.rms)
    return (
        du.to(ctx.x_dtype),
        None if ctx.residual_dtype is None else du.to(ctx.residual_dtype),
        dweight.to(weight_C.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
    )


norm_forward.register_autograd(_backward, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """``x`` as a matrix of rows without gaps in them, copied only where it has to be."""
    x_NC = x.reshape(-1, x.shape[-1])
    return x_NC if x_NC.stride(1) == 1 else x_NC.contiguous()


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """(normalised, ``x`` + ``residual``) for inputs that `refusal` has nothing against."""
    rows = None if residual is None else _rows(residual)
    bias = None if bias is None else bias.contiguous()
    out, total, _, _ = norm_forward(_rows(x), rows, weight.contiguous(), bias, eps, rms)
    return out.view(x.shape), x if residual is None else total.view(x.shape)


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if why := dtype_refusal(*given):
        return why
    if x.numel() == 0:
        return "empty input"
    if x.shape[-1] > WIDEST:
        return f"width {x.shape[-1]} is above {WIDEST}"
    if residual is not None and residual.shape != x.shape:
        return "the residual has another shape"
    return None
