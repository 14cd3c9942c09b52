"""Norm and rotary position embedding (Su et al. 2021) of head vectors, in one pass.

    x̂ = x rstd       n = x̂ weight      out = (n₁ cos₁ - n₂ sin₁, n₂ cos₂ + n₁ sin₂)
    g = (dout₁ cos₁ + dout₂ sin₂, dout₂ cos₂ - dout₁ sin₁)
    dx = rstd (g weight - x̂ mean(g weight x̂))           dweight = Σ g x̂

with ₁ and ₂ the halves of a vector. A program has one head, so that its share of that head's
dweight stays in registers; torch adds the shares.
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
    processors,
)

WIDEST = 256
# Elements of a program's tile, both halves: sixteen vectors of 64.
TILE_ELEMENTS = 1024


@triton.jit
def load_halves(BASE, vector, present, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of the vectors that begin ``vector`` numbers from BASE; zero where none is."""
    column = tl.arange(0, BLOCK)
    mask = present[:, None] & (column < HALF)[None, :]
    address = BASE + vector[:, None] + column[None, :]
    first = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(BASE, vector, present, first, second, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_halves`."""
    column = tl.arange(0, BLOCK)
    mask = present[:, None] & (column < HALF)[None, :]
    address = BASE + vector[:, None] + column[None, :]
    tl.store(address, first.to(BASE.dtype.element_ty), mask=mask)
    tl.store(address + HALF, second.to(BASE.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(WEIGHT, head, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of a head's weight, as rows."""
    column = tl.arange(0, BLOCK)
    address = WEIGHT + head * 2 * HALF + column
    first = tl.load(address, mask=column < HALF, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def tinylm_norm_rotary_forward(
    X, WEIGHT, COS, SIN, OUT, RSTD, tokens, length, x_batch, x_time, x_head, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head per program. COS and SIN have a row for each position."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = token < tokens
    batch, time = token // length, token % length
    x = batch * x_batch + time * x_time + head * x_head
    x1, x2 = load_halves(X, x, present, HALF, BLOCK)
    squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
    rstd = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
    tl.store(RSTD + token * heads + head, rstd, mask=present)
    weight1, weight2 = load_weight(WEIGHT, head, HALF, BLOCK)
    n1, n2 = x1 * rstd[:, None] * weight1, x2 * rstd[:, None] * weight2
    cos1, cos2 = load_halves(COS, time * 2 * HALF, present, HALF, BLOCK)
    sin1, sin2 = load_halves(SIN, time * 2 * HALF, present, HALF, BLOCK)
    out = (token * heads + head) * 2 * HALF
    out1, out2 = n1 * cos1 - n2 * sin1, n2 * cos2 + n1 * sin2
    store_halves(OUT, out, present, out1, out2, HALF, BLOCK)


@triton.jit
def tinylm_norm_rotary_backward(
    X, WEIGHT, COS, SIN, RSTD, DOUT, DX, DWEIGHT, tokens, length, tiles, x_batch, x_time, x_head,
    dout_batch, dout_time, dout_head,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``tiles`` tiles of ROWS tokens of one head per program, and its share of dweight."""
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    weight1, weight2 = load_weight(WEIGHT, head, HALF, BLOCK)
    dweight1 = tl.zeros([BLOCK], tl.float32)
    dweight2 = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        token = (program.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        present = token < tokens
        batch, time = token // length, token % length
        x = batch * x_batch + time * x_time + head * x_head
        dout = batch * dout_batch + time * dout_time + head * dout_head
        dout1, dout2 = load_halves(DOUT, dout, present, HALF, BLOCK)
        cos1, cos2 = load_halves(COS, time * 2 * HALF, present, HALF, BLOCK)
        sin1, sin2 = load_halves(SIN, time * 2 * HALF, present, HALF, BLOCK)
        g1, g2 = dout1 * cos1 + dout2 * sin2, dout2 * cos2 - dout1 * sin1
        x1, x2 = load_halves(X, x, present, HALF, BLOCK)
        rstd = tl.load(RSTD + token * heads + head, mask=present, other=0.0)[:, None]
        normal1, normal2 = x1 * rstd, x2 * rstd
        dweight1 += tl.sum(g1 * normal1, 0)
        dweight2 += tl.sum(g2 * normal2, 0)
        g1, g2 = g1 * weight1, g2 * weight2
        mean = (tl.sum(g1 * normal1, 1) + tl.sum(g2 * normal2, 1))[:, None] / (2 * HALF)
        dx1, dx2 = (g1 - normal1 * mean) * rstd, (g2 - normal2 * mean) * rstd
        store_halves(DX, (token * heads + head) * 2 * HALF, present, dx1, dx2, HALF, BLOCK)
    column = tl.arange(0, BLOCK)
    share = DWEIGHT + (program * heads + head) * 2 * HALF + column
    tl.store(share, dweight1, mask=column < HALF)
    tl.store(share + HALF, dweight2, mask=column < HALF)


def tile_for(width: int) -> Tile:
    block = power_of_two(width // 2)
    return Tile(max(1, TILE_ELEMENTS // (2 * block)), block, warps=4)


def _strides(x_BTHD: Tensor) -> tuple[int, ...]:
    return x_BTHD.stride()[:3]


@torch.library.custom_op("tinylm::rotary_forward", mutates_args=())
def rotary_forward(
    x_BTHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(out_BTHD, rstd_BTH), without gaps."""
    B, T, H, D = x_BTHD.shape
    out, rstd = _rotary_forward_outputs(x_BTHD)
    tile = tile_for(D)
    with on_device(x_BTHD):
        tinylm_norm_rotary_forward[(triton.cdiv(B * T, tile.rows), H)](
            x_BTHD, weight_HD, cos_TD, sin_TD, out, rstd, B * T, T, *_strides(x_BTHD), eps,
            HALF=D // 2, BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
        )  # fmt: skip
    return out, rstd


def _rotary_forward_outputs(x_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    return out, x_BTHD.new_empty(x_BTHD.shape[:3], dtype=torch.float32)


@torch.library.custom_op("tinylm::rotary_backward", mutates_args=())
def rotary_backward(
    dout_BTHD: Tensor, x_BTHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor,
    rstd_BTH: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx_BTHD, dweight_HD in fp32)."""
    B, T, H, D = x_BTHD.shape
    tile = tile_for(D)
    tiles = triton.cdiv(B * T, tile.rows)
    # Enough to fill the device, few enough to add up quickly.
    programs = min(tiles, triton.cdiv(4 * processors(x_BTHD), H))
    dx = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    dweight_PHD = x_BTHD.new_empty(programs, H, D, dtype=torch.float32)
    with on_device(x_BTHD):
        tinylm_norm_rotary_backward[(programs, H)](
            x_BTHD, weight_HD, cos_TD, sin_TD, rstd_BTH, dout_BTHD, dx, dweight_PHD, B * T, T,
            triton.cdiv(tiles, programs), *_strides(x_BTHD), *_strides(dout_BTHD),
            HALF=D // 2, BLOCK=tile.columns, ROWS=tile.rows, **tile.launch,
        )  # fmt: skip
    return dx, dweight_PHD.sum(0)


@rotary_forward.register_fake
def _(
    x_BTHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _rotary_forward_outputs(x_BTHD)


@rotary_backward.register_fake
def _(
    dout_BTHD: Tensor, x_BTHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor,
    rstd_BTH: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    return dx, x_BTHD.new_empty(x_BTHD.shape[2:], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BTHD, weight_HD, cos_TD, sin_TD, _ = inputs
    ctx.save_for_backward(x_BTHD, weight_HD, cos_TD, sin_TD, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_BTHD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout_BTHD is None:
        return (None,) * 5
    dx, dweight = rotary_backward(dense_last(dout_BTHD), *ctx.saved_tensors)
    return dx, dweight.to(ctx.saved_tensors[1].dtype), None, None, None


rotary_forward.register_autograd(_backward, setup_context=_setup_context)


def norm_rotary(
    x_BTHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> Tensor:
    """For inputs that `refusal` has nothing against."""
    tables = cos_TD.float().contiguous(), sin_TD.float().contiguous()
    out: Tensor = rotary_forward(dense_last(x_BTHD), weight_HD.contiguous(), *tables, eps)[0]
    return out


def refusal(x_BTHD: Tensor, weight_HD: Tensor) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    if why := dtype_refusal(x_BTHD, weight_HD):
        return why
    if x_BTHD.numel() == 0:
        return "empty input"
    D = x_BTHD.shape[-1]
    if weight_HD.shape != x_BTHD.shape[2:]:
        return f"the weight is not one of {tuple(x_BTHD.shape[2:])}"
    return f"head dimension {D} is odd, or above {WIDEST}" if D % 2 or D > WIDEST else None
