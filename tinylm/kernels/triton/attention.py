"""Attention as Triton kernels: tiles, launches, and what torch has to know of them.

The kernels are in `attention_kernels`; `attention_decode` serves a few queries on many keys.

Inputs may have any strides but gaps inside a head vector, so views of packed projections need no
copy. Results are dense in the order B, T, H, D, in which the next projection reads them.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from tinylm.kernels.triton import attention_decode
from tinylm.kernels.triton.attention_kernels import (
    tinylm_attention_backward,
    tinylm_attention_backward_dkdv,
    tinylm_attention_backward_dq,
    tinylm_attention_forward,
)
from tinylm.kernels.triton.common import (
    LOG2E,
    MOST_REGISTERS,
    Tile,
    capability,
    dense_last,
    dtype_refusal,
    matmul_refusal,
    on_device,
    power_of_two,
)

LONGEST_WHOLE_HEAD = 64
LARGEST_HEAD_DIM = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}


# With these tiles the compiled code spills nothing on any architecture and fits into the 64 KB of
# shared memory that there are below capability 8.0. fp32 products do not run on tensor cores; they
# get small tiles and many warps.


def forward_tile(
    capability: tuple[int, int], dtype: torch.dtype, length: int, head_dim: int
) -> Tile:
    """Queries × keys; one program per head up to `LONGEST_WHOLE_HEAD` keys."""
    whole = whole_head_tile(dtype, length, head_dim)
    if whole is not None and whole.rows <= 32:
        return whole
    if dtype == torch.float32:
        return Tile(32, 32, warps=8)
    return Tile(64, 32, warps=4, stages=2 if capability >= (8, 0) else 1)


def whole_head_tile(dtype: torch.dtype, length: int, head_dim: int, group: int = 1) -> Tile | None:
    """All queries × all keys, if they fit into one program of the backward pass.

    The loop over a group of query heads takes registers and shared memory of its own.
    """
    side = power_of_two(length)
    if dtype == torch.float32:
        fits = side <= 32 and (group == 1 or side * head_dim <= 1024)
        return Tile(side, side, warps=side // 4) if fits else None
    if side > LONGEST_WHOLE_HEAD or (group > 1 and side * head_dim > 2048):
        return None
    wide = head_dim > 64 if group == 1 else side * head_dim > 1024
    return Tile(side, side, warps=side // 16 * (2 if wide else 1))


def backward_tiles(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, crowded: bool
) -> tuple[Tile, Tile]:
    """Queries × keys of the kernel that sums over keys, and of the one that sums over queries.

    The latter is ``crowded`` where it has documents and a group of query heads to keep track of.
    """
    if dtype == torch.float32:
        return Tile(32, 32, warps=8), Tile(32, 32, warps=8)
    stages = 2 if capability >= (8, 0) else 1
    keys = 64 if head_dim <= (32 if crowded else 64) else 32
    return Tile(64, 32, warps=4, stages=stages), Tile(32, keys, warps=4, stages=stages)


@torch.library.custom_op("tinylm::attention_forward", mutates_args=())
def attention_forward(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, start_BT: Tensor | None,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out_BTHD, lse_BHT), the latter in base 2."""
    B, H, T, D = q_BHTD.shape
    S = k_BHSD.shape[2]
    out_BTHD = q_BHTD.new_empty(B, T, H, D)
    lse_BHT = q_BHTD.new_empty(B, H, T, dtype=torch.float32)
    tile = forward_tile(capability(q_BHTD), q_BHTD.dtype, S, D)
    inputs = q_BHTD, k_BHSD, v_BHSD, start_BT
    with on_device(q_BHTD):
        if attention_decode.takes(q_BHTD, k_BHSD):
            attention_decode.forward(*inputs, out_BTHD, lse_BHT, scale, causal, _strides(*inputs))
            return out_BTHD, lse_BHT
        tinylm_attention_forward[(B * H, triton.cdiv(T, tile.rows))](
            *inputs, out_BTHD, lse_BHT, scale * LOG2E.value, H, H // k_BHSD.shape[1], T, S,
            *_strides(*inputs),
            CAUSAL=causal, D=D, BLOCK_D=power_of_two(D),
            BLOCK_T=tile.rows, BLOCK_S=tile.columns, **tile.launch,
            maxnreg=MOST_REGISTERS if D > 64 or (start_BT is not None and D > 16) else None,
        )  # fmt: skip
    return out_BTHD, lse_BHT


@torch.library.custom_op("tinylm::attention_backward", mutates_args=())
def attention_backward(
    dout_BTHD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor,
    start_BT: Tensor | None, out_BTHD: Tensor, lse_BHT: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq_BTHD, dk_BSHD, dv_BSHD)."""
    (B, H, T, D), (_, H_kv, S, _) = q_BHTD.shape, k_BHSD.shape
    dout_BTHD = dense_last(dout_BTHD)
    dq = q_BHTD.new_empty(B, T, H, D)
    dk, dv = (q_BHTD.new_empty(B, S, H_kv, D) for _ in range(2))
    shape = {"CAUSAL": causal, "D": D, "BLOCK_D": power_of_two(D)}
    inputs = q_BHTD, k_BHSD, v_BHSD, start_BT
    strides = *_strides(*inputs), *dout_BTHD.stride()[:3]
    whole = whole_head_tile(q_BHTD.dtype, S, D, H // H_kv)
    grouped, documents = H_kv < H, start_BT is not None
    by_query, by_key = backward_tiles(
        capability(q_BHTD), q_BHTD.dtype, D, crowded=grouped and documents
    )
    # Elsewhere one program more on a processor is worth having.
    registers = registers_by_key = MOST_REGISTERS if q_BHTD.dtype == torch.float32 else None
    if documents and D > 32 and (grouped or not causal):
        registers_by_key = MOST_REGISTERS
    with on_device(q_BHTD):
        if whole is not None:
            tinylm_attention_backward[(B * H_kv,)](
                *inputs, out_BTHD, dout_BTHD, lse_BHT, dq, dk, dv, scale, H_kv, H // H_kv, T, S,
                *strides, **shape, BLOCK=whole.rows, **whole.launch, maxnreg=registers,
            )  # fmt: skip
            return dq, dk, dv
        delta_BHT = torch.empty_like(lse_BHT)
        tinylm_attention_backward_dq[(B * H, triton.cdiv(T, by_query.rows))](
            *inputs, out_BTHD, dout_BTHD, lse_BHT, delta_BHT, dq, scale, H, H // H_kv, T, S,
            *strides, **shape, BLOCK_T=by_query.rows, BLOCK_S=by_query.columns, **by_query.launch,
            maxnreg=registers,
        )  # fmt: skip
        tinylm_attention_backward_dkdv[(B * H_kv, triton.cdiv(S, by_key.columns))](
            *inputs, dout_BTHD, lse_BHT, delta_BHT, dk, dv, scale, H_kv, H // H_kv, T, S,
            *strides, **shape, BLOCK_T=by_key.rows, BLOCK_S=by_key.columns, **by_key.launch,
            maxnreg=registers_by_key,
        )  # fmt: skip
    return dq, dk, dv


def _strides(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, start_BT: Tensor | None
) -> tuple[int, ...]:
    start = (0, 0) if start_BT is None else start_BT.stride()
    return *q_BHTD.stride()[:3], *k_BHSD.stride()[:3], *v_BHSD.stride()[:3], *start


@attention_forward.register_fake
def _(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, D), q_BHTD.new_empty(B, H, T, dtype=torch.float32)


@attention_backward.register_fake
def _(
    dout_BTHD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, D), (_, H_kv, S, _) = q_BHTD.shape, k_BHSD.shape
    new = q_BHTD.new_empty
    return new(B, T, H, D), new(B, S, H_kv, D), new(B, S, H_kv, D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale, ctx.causal = inputs[4:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_BTHD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout_BTHD is None:
        return (None,) * 6
    grads = attention_backward(dout_BTHD, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *(g.transpose(1, 2) for g in grads), None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def attention(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, start_BT: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """`tinylm.kernels.causal_attention` for inputs that `refusal` has nothing against."""
    inputs = (dense_last(x) for x in (q_BHTD, k_BHSD, v_BHSD))
    out_BTHD: Tensor = attention_forward(*inputs, start_BT, scale, causal)[0]
    return out_BTHD.transpose(1, 2)


def refusal(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    head_dim = q_BHTD.shape[3]
    largest = LARGEST_HEAD_DIM.get(q_BHTD.dtype, 0)
    if why := dtype_refusal(q_BHTD) or matmul_refusal(q_BHTD):
        return why
    if head_dim > largest:
        return f"head dimension {head_dim} is above {largest} ({q_BHTD.dtype})"
    if q_BHTD.numel() == 0:
        return "empty input"
    if any(x.shape[2] * x.stride(2) >= 2**31 for x in (q_BHTD, k_BHSD, v_BHSD)):
        return "a head spans more than 2³¹ elements"
    return None
