"""Attention without the T × S scores in memory (Dao et al. 2022, Dao 2023).

Of each query row only the logarithm of its softmax's denominator is kept, ``lse``:

    s = scale q kᵀ        p = exp(s - lse)        out = p v
    dv = pᵀ dout          ds = p (dout vᵀ - rowsum(out dout))
    dq = scale ds k       dk = scale dsᵀ q

Up to 64 positions a whole head fits into one program, and one kernel gives all three gradients.
Above, one kernel gives dq (a program per tile of queries), a second dk and dv (per tile of keys,
summed over the query heads that share them), so nothing is ever added up in memory.

Inputs may have any strides but gaps inside a head vector, so views of packed projections need no
copy. Results are dense in the order B, T, H, D, in which the next projection reads them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.kernels.triton.common import (
    LOG2E,
    MASKED,
    Tile,
    capability,
    dense_last,
    dtype_refusal,
    load_rows,
    matmul_refusal,
    on_device,
    power_of_two,
    store_rows,
)

LONGEST_WHOLE_HEAD = 64
LARGEST_HEAD_DIM = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
# Lengths change from call to call in generation: no kernel of its own for each.
_LENGTHS = ["T", "S"]


@triton.jit
def _scores(q, k, row, column, T, S, scale_log2, CAUSAL: tl.constexpr):
    """Scores in base 2, MASKED where a query may not look. The queries are the last T of S."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    mask = (column < S)[None, :]
    if CAUSAL:
        mask = mask & (row[:, None] + (S - T) >= column[None, :])
    return tl.where(mask, s, MASKED)


@triton.jit(do_not_specialize=_LENGTHS)
def tinylm_attention_forward(
    Q, K, V, OUT, LSE, scale_log2, heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of queries; the running maximum rescales what was summed."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    q = load_rows(Q + b * q_b + h * q_h, row, T, q_t, D, BLOCK_D)
    K += b * k_b + h // group * k_h
    V += b * v_b + h // group * v_h

    top = tl.full([BLOCK_T], MASKED, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + (tile + 1) * BLOCK_T)
    for start in range(0, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, column, S, k_s, D, BLOCK_D)
        s = _scores(q, k, row, column, T, S, scale_log2, CAUSAL)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, column, S, v_s, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    out_head = OUT + (b * T * heads + h) * D
    store_rows(out_head, row, T, heads * D, out / total[:, None], D, BLOCK_D)
    tl.store(LSE + (b * heads + h) * T + row, top + tl.log2(total), mask=row < T)


@triton.jit(do_not_specialize=_LENGTHS)
def tinylm_attention_backward(
    Q, K, V, OUT, DOUT, LSE, DQ, DK, DV, scale, kv_heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_t, do_h,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per head of keys: T and S are at most BLOCK."""
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    heads = kv_heads * group
    at = tl.arange(0, BLOCK)
    k = load_rows(K + b * k_b + kv_h * k_h, at, S, k_s, D, BLOCK_D)
    v = load_rows(V + b * v_b + kv_h * v_h, at, S, v_s, D, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for member in range(group):
        h = kv_h * group + member
        head = (b * T * heads + h) * D  # of what is dense in the order B, T, H, D
        q = load_rows(Q + b * q_b + h * q_h, at, T, q_t, D, BLOCK_D)
        out = load_rows(OUT + head, at, T, heads * D, D, BLOCK_D)
        dout = load_rows(DOUT + b * do_b + h * do_h, at, T, do_t, D, BLOCK_D)
        lse = tl.load(LSE + (b * heads + h) * T + at, mask=at < T, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        s = _scores(q, k, at, at, T, S, scale * LOG2E, CAUSAL)
        p = tl.exp2(s - lse[:, None])
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        store_rows(DQ + head, at, T, heads * D, dq, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    kv_head = (b * S * kv_heads + kv_h) * D
    store_rows(DK + kv_head, at, S, kv_heads * D, dk * scale, D, BLOCK_D)
    store_rows(DV + kv_head, at, S, kv_heads * D, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=_LENGTHS)
def tinylm_attention_backward_dq(
    Q, K, V, OUT, DOUT, LSE, DELTA, DQ, scale, heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_t, do_h,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of queries; leaves rowsum(out dout) for the other kernel."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    head = (b * T * heads + h) * D
    rows = (b * heads + h) * T + row
    q = load_rows(Q + b * q_b + h * q_h, row, T, q_t, D, BLOCK_D)
    out = load_rows(OUT + head, row, T, heads * D, D, BLOCK_D)
    dout = load_rows(DOUT + b * do_b + h * do_h, row, T, do_t, D, BLOCK_D)
    lse = tl.load(LSE + rows, mask=row < T, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + rows, delta, mask=row < T)
    K += b * k_b + h // group * k_h
    V += b * v_b + h // group * v_h

    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + (tile + 1) * BLOCK_T)
    for start in range(0, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, column, S, k_s, D, BLOCK_D)
        v = load_rows(V, column, S, v_s, D, BLOCK_D)
        s = _scores(q, k, row, column, T, S, scale * LOG2E, CAUSAL)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(DQ + head, row, T, heads * D, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=_LENGTHS)
def tinylm_attention_backward_dkdv(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, scale, kv_heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_t, do_h,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of keys, over all queries that see them.

    Scores are computed transposed, so that no tile has to be turned around before a product.
    """
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    heads = kv_heads * group
    first = tl.program_id(1) * BLOCK_S
    column = first + tl.arange(0, BLOCK_S)
    k = load_rows(K + b * k_b + kv_h * k_h, column, S, k_s, D, BLOCK_D)
    v = load_rows(V + b * v_b + kv_h * v_h, column, S, v_s, D, BLOCK_D)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, first - (S - T)) // BLOCK_T * BLOCK_T
    for member in range(group):
        h = kv_h * group + member
        for start in range(begin, T, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            rows = (b * heads + h) * T + row
            q = load_rows(Q + b * q_b + h * q_h, row, T, q_t, D, BLOCK_D)
            dout = load_rows(DOUT + b * do_b + h * do_h, row, T, do_t, D, BLOCK_D)
            lse = tl.load(LSE + rows, mask=row < T, other=0.0)
            delta = tl.load(DELTA + rows, mask=row < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            mask = (row < T)[None, :]
            if CAUSAL:
                mask = mask & (row[None, :] + (S - T) >= column[:, None])
            p = tl.exp2(tl.where(mask, s - lse[None, :], MASKED))
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    kv_head = (b * S * kv_heads + kv_h) * D
    store_rows(DK + kv_head, column, S, kv_heads * D, dk * scale, D, BLOCK_D)
    store_rows(DV + kv_head, column, S, kv_heads * D, dv, D, BLOCK_D)


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


def whole_head_tile(dtype: torch.dtype, length: int, head_dim: int) -> Tile | None:
    """All queries × all keys, if they fit into one program of the backward pass."""
    side = power_of_two(length)
    if dtype == torch.float32:
        return Tile(side, side, warps=side // 4) if side <= 32 else None
    if side > LONGEST_WHOLE_HEAD:
        return None
    return Tile(side, side, warps=side // 16 * (1 if head_dim <= 64 else 2))


def backward_tiles(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> tuple[Tile, Tile]:
    """Queries × keys of the kernel that sums over keys, and of the one that sums over queries."""
    if dtype == torch.float32:
        return Tile(32, 32, warps=8), Tile(32, 32, warps=8)
    stages = 2 if capability >= (8, 0) else 1
    keys = 64 if head_dim <= 64 else 32
    return Tile(64, 32, warps=4, stages=stages), Tile(32, keys, warps=4, stages=stages)


@torch.library.custom_op("tinylm::attention_forward", mutates_args=())
def attention_forward(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out_BTHD, lse_BHT), the latter in base 2."""
    B, H, T, D = q_BHTD.shape
    S = k_BHSD.shape[2]
    out_BTHD = q_BHTD.new_empty(B, T, H, D)
    lse_BHT = q_BHTD.new_empty(B, H, T, dtype=torch.float32)
    tile = forward_tile(capability(q_BHTD), q_BHTD.dtype, S, D)
    with on_device(q_BHTD):
        tinylm_attention_forward[(B * H, triton.cdiv(T, tile.rows))](
            q_BHTD, k_BHSD, v_BHSD, out_BTHD, lse_BHT,
            scale * LOG2E.value, H, H // k_BHSD.shape[1], T, S,
            *q_BHTD.stride()[:3], *k_BHSD.stride()[:3], *v_BHSD.stride()[:3],
            CAUSAL=causal, D=D, BLOCK_D=power_of_two(D),
            BLOCK_T=tile.rows, BLOCK_S=tile.columns, **tile.launch,
        )  # fmt: skip
    return out_BTHD, lse_BHT


@torch.library.custom_op("tinylm::attention_backward", mutates_args=())
def attention_backward(
    dout_BTHD: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, out_BTHD: Tensor,
    lse_BHT: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq_BTHD, dk_BSHD, dv_BSHD)."""
    (B, H, T, D), (_, H_kv, S, _) = q_BHTD.shape, k_BHSD.shape
    dout_BTHD = dense_last(dout_BTHD)
    dq = q_BHTD.new_empty(B, T, H, D)
    dk, dv = (q_BHTD.new_empty(B, S, H_kv, D) for _ in range(2))
    strides = (
        *q_BHTD.stride()[:3], *k_BHSD.stride()[:3], *v_BHSD.stride()[:3], *dout_BTHD.stride()[:3],
    )  # fmt: skip
    shape = {"CAUSAL": causal, "D": D, "BLOCK_D": power_of_two(D)}
    inputs = q_BHTD, k_BHSD, v_BHSD
    whole = whole_head_tile(q_BHTD.dtype, S, D)
    by_query, by_key = backward_tiles(capability(q_BHTD), q_BHTD.dtype, D)
    with on_device(q_BHTD):
        if whole is not None:
            tinylm_attention_backward[(B * H_kv,)](
                *inputs, out_BTHD, dout_BTHD, lse_BHT, dq, dk, dv, scale, H_kv, H // H_kv, T, S,
                *strides, **shape, BLOCK=whole.rows, **whole.launch,
            )  # fmt: skip
            return dq, dk, dv
        delta_BHT = torch.empty_like(lse_BHT)
        tinylm_attention_backward_dq[(B * H, triton.cdiv(T, by_query.rows))](
            *inputs, out_BTHD, dout_BTHD, lse_BHT, delta_BHT, dq, scale, H, H // H_kv, T, S,
            *strides, **shape, BLOCK_T=by_query.rows, BLOCK_S=by_query.columns, **by_query.launch,
        )  # fmt: skip
        tinylm_attention_backward_dkdv[(B * H_kv, triton.cdiv(S, by_key.columns))](
            *inputs, dout_BTHD, lse_BHT, delta_BHT, dk, dv, scale, H_kv, H // H_kv, T, S,
            *strides, **shape, BLOCK_T=by_key.rows, BLOCK_S=by_key.columns, **by_key.launch,
        )  # fmt: skip
    return dq, dk, dv


@attention_forward.register_fake
def _(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
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
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale, ctx.causal = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_BTHD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout_BTHD is None:
        return (None,) * 5
    grads = attention_backward(dout_BTHD, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *(g.transpose(1, 2) for g in grads), None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool) -> Tensor:
    """`tinylm.kernels.causal_attention` for inputs that `refusal` has nothing against."""
    inputs = (dense_last(x) for x in (q_BHTD, k_BHSD, v_BHSD))
    out_BTHD: Tensor = attention_forward(*inputs, scale, causal)[0]
    return out_BTHD.transpose(1, 2)


def refusal(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, start_B: Tensor | None) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    head_dim, T, S = q_BHTD.shape[3], q_BHTD.shape[2], k_BHSD.shape[2]
    largest = LARGEST_HEAD_DIM.get(q_BHTD.dtype, 0)
    if start_B is not None:
        return "left padding is not in the kernels"
    if not (k_BHSD.dtype == v_BHSD.dtype == q_BHTD.dtype):
        return f"mixed dtypes {q_BHTD.dtype}, {k_BHSD.dtype} and {v_BHSD.dtype}"
    if why := dtype_refusal(q_BHTD) or matmul_refusal(q_BHTD):
        return why
    if (
        k_BHSD.shape != v_BHSD.shape
        or q_BHTD.shape[0] != k_BHSD.shape[0]
        or k_BHSD.shape[3] != head_dim
    ):
        return "queries, keys and values do not have the same batch and head dimension"
    if q_BHTD.shape[1] % k_BHSD.shape[1]:
        return "the query heads are not a multiple of the key heads"
    if head_dim > largest:
        return f"head dimension {head_dim} is above {largest} ({q_BHTD.dtype})"
    if T > S:
        return f"{T} queries are more than {S} keys"
    if q_BHTD.numel() == 0:
        return "empty input"
    if any(x.shape[2] * x.stride(2) >= 2**31 for x in (q_BHTD, k_BHSD, v_BHSD)):
        return "a head spans more than 2³¹ elements"
    return None
