"""Attention of a few queries on many keys, as in decoding with a cache (Dao et al. 2023).

A head has too few queries to fill a GPU, so its keys are split between programs, each of which
leaves the attention to its own keys and the logarithm of its denominator. A second kernel weighs
the parts by exp(lse). The query heads that share keys are the rows of one program's products, so
that keys and values are read once. Where there is nothing to split, the first kernel is enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.kernels.triton.attention_kernels import LENGTHS, seeing, visible
from tinylm.kernels.triton.common import (
    LOG2E,
    MASKED,
    MOST_REGISTERS,
    Tile,
    capability,
    load_rows,
    power_of_two,
    processors,
    store_rows,
)

# Most query rows (queries × heads that share keys) of a program: the least rows of a product.
ROWS = 16
# Fewer keys than this are not worth a program of their own.
LEAST_KEYS = 128
# Programs per processor of the GPU that splitting aims at.
PROGRAMS_PER_PROCESSOR = 2


@triton.jit(do_not_specialize=[*LENGTHS, "chunk"])
def tinylm_attention_decode(
    Q, K, V, START, OUT, LSE, scale_log2, kv_heads, group, T, S, chunk,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, start_b, start_t,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per head of keys and chunk of them, for all ``group * T`` rows of queries.

    SPLIT: OUT and LSE have a leading dimension, of chunks. A row that sees nothing has lse = 0,
    of a chunk that it does not see MASKED.
    """
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    heads = kv_heads * group
    batch = tl.num_programs(0) // kv_heads
    row = tl.arange(0, BLOCK_R)
    query, h = row % T, kv_h * group + row // T
    real = row < group * T
    column_D = tl.arange(0, BLOCK_D)
    mask_D = real[:, None] & (column_D < D)[None, :]
    q_row = b * q_b + h * q_h + query * q_t
    q = tl.load(Q + q_row[:, None] + column_D[None, :], mask=mask_D, other=0.0)
    K += b * k_b + kv_h * k_h
    V += b * v_b + kv_h * v_h
    begin = tl.program_id(1) * chunk
    end = tl.minimum(S, begin + chunk)
    first = row
    if START is not None:
        first = tl.load(START + b * start_b + query * start_t, mask=real, other=0)
        first = tl.where(real, tl.minimum(tl.maximum(first, 0), S), S).to(tl.int32)
        begin = tl.maximum(begin, tl.min(first, 0) // BLOCK_S * BLOCK_S)

    top = tl.full([BLOCK_R], MASKED, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, column, S, k_s, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        mask = visible(
            query[:, None], column[None, :], first[:, None], T, S, CAUSAL, START is not None
        )
        s = tl.where(mask, s, MASKED)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, column, S, v_s, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top

    live = seeing(top, total)
    total = tl.where(live, total, 1.0)
    out = tl.where(live[:, None], out / total[:, None], 0.0)
    lse = tl.where(live, top + tl.log2(total), MASKED if SPLIT else 0.0)
    queries = batch * heads * T
    out_row = part * queries + (b * T + query) * heads + h
    address = OUT + out_row[:, None] * D + column_D[None, :]
    tl.store(address, out.to(OUT.dtype.element_ty), mask=mask_D)
    tl.store(LSE + part * queries + (b * heads + h) * T + query, lse, mask=real)


@triton.jit(do_not_specialize=["T", "queries", "parts"])
def tinylm_attention_combine(
    PARTS, PART_LSE, OUT, LSE, heads, T, queries, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = Σ exp(lse_i - lse) out_i, lse = log Σ exp lse_i, over the parts, in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = row // heads
    lse_row = ((token // T) * heads + row % heads) * T + token % T
    top = tl.full([BLOCK_R], MASKED, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for part in range(parts):
        lse = tl.load(PART_LSE + part * queries + lse_row, mask=row < queries, other=MASKED)
        new_top = tl.maximum(top, lse)
        weight = tl.exp2(lse - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + weight
        part_out = load_rows(PARTS, row, queries, D, D, BLOCK_D)
        out = out * shrink[:, None] + part_out * weight[:, None]
        top = new_top
        PARTS += queries * D
    live = seeing(top, total)
    out = tl.where(live[:, None], out / total[:, None], 0.0)
    store_rows(OUT, row, queries, D, out, D, BLOCK_D)
    tl.store(LSE + lse_row, tl.where(live, top + tl.log2(total), 0.0), mask=row < queries)


def takes(q_BHTD: Tensor, k_BHSD: Tensor) -> bool:
    """Whether a call has few enough queries for these kernels, and keys beyond them."""
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    return T < S and T * q_BHTD.shape[1] // k_BHSD.shape[1] <= ROWS


def tile_for(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tile:
    if dtype == torch.float32:
        return Tile(ROWS, 32, warps=4)
    if capability < (8, 0):
        return Tile(ROWS, 64, warps=4)
    return Tile(ROWS, 64 if head_dim <= 64 else 32, warps=4, stages=3)


def chunk_for(x: Tensor, programs: int, S: int, block: int) -> int:
    """Keys of each program: whole tiles, as many as keep every processor busy."""
    parts = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(x), programs)
    parts = max(1, min(parts, S // LEAST_KEYS))
    tiles: int = triton.cdiv(triton.cdiv(S, parts), block)
    return tiles * block


def forward(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, start_BT: Tensor | None,
    out_BTHD: Tensor, lse_BHT: Tensor, scale: float, causal: bool, strides: tuple[int, ...],
) -> None:  # fmt: skip
    """Fills ``out_BTHD`` and ``lse_BHT``; ``strides`` are those of the inputs."""
    (B, H, T, D), (_, H_kv, S, _) = q_BHTD.shape, k_BHSD.shape
    tile = tile_for(capability(q_BHTD), q_BHTD.dtype, D)
    chunk = chunk_for(q_BHTD, B * H_kv, S, tile.columns)
    parts = triton.cdiv(S, chunk)
    out, lse = out_BTHD, lse_BHT
    if parts > 1:
        out = out_BTHD.new_empty(parts, *out_BTHD.shape, dtype=torch.float32)
        lse = lse_BHT.new_empty(parts, *lse_BHT.shape)
    tinylm_attention_decode[(B * H_kv, parts)](
        q_BHTD, k_BHSD, v_BHSD, start_BT, out, lse,
        scale * LOG2E.value, H_kv, H // H_kv, T, S, chunk, *strides,
        CAUSAL=causal, SPLIT=parts > 1, D=D, BLOCK_D=power_of_two(D),
        BLOCK_R=tile.rows, BLOCK_S=tile.columns, **tile.launch,
        maxnreg=MOST_REGISTERS if q_BHTD.dtype == torch.float32 or D <= 16 else None,
    )  # fmt: skip
    if parts > 1:
        rows = max(1, 256 // power_of_two(D))
        tinylm_attention_combine[(triton.cdiv(B * T * H, rows),)](
            out, lse, out_BTHD, lse_BHT, H, T, B * T * H, parts,
            D=D, BLOCK_D=power_of_two(D), BLOCK_R=rows, num_warps=1,
        )  # fmt: skip
