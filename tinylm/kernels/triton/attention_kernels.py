"""Attention without the T × S scores in memory (Dao et al. 2022, Dao 2023): the kernels.

Of each query row only the logarithm of its softmax's denominator is kept, ``lse``:

    s = scale q kᵀ        p = exp(s - lse)        out = p v
    dv = pᵀ dout          ds = p (dout vᵀ - rowsum(out dout))
    dq = scale ds k       dk = scale dsᵀ q

Up to 64 positions a whole head fits into one program, and one kernel gives all three gradients.
Above, one kernel gives dq (a program per tile of queries), a second dk and dv (per tile of keys,
summed over the query heads that share them), so nothing is ever added up in memory.

START, if not None, holds the first key that each query may see. Tiles of keys before the first
of all starts of a tile of queries are not visited, nor are, for a tile of keys, the queries after
the last one that sees it. Nothing is assumed about the order of the starts. A query that sees
nothing has out = 0, and lse = 0, with which the backward kernels find p = 0.
"""

import triton
import triton.language as tl

from tinylm.kernels.triton.common import LOG2E, MASKED, load_rows, store_rows

# Lengths change from call to call in generation: no kernel of its own for each.
LENGTHS = ["T", "S"]
# Starts that are read at once where a program looks for the last query that sees its keys.
SEARCHED = tl.constexpr(128)


@triton.jit
def visible(row, column, first, T, S, CAUSAL: tl.constexpr, STARTED: tl.constexpr):
    """Where a query may look, for rows and columns that broadcast; the queries are the last T."""
    mask = column < S
    if CAUSAL:
        mask = mask & (row + (S - T) >= column)
    if STARTED:
        mask = mask & (first <= column)
    return mask


@triton.jit
def seeing(top, total):
    """The rows that see any key. Scores of NaN leave ``top`` as it was, but must not vanish."""
    return (top > MASKED) | (total != total)


@triton.jit
def first_keys(START, row, T, S, start_t):
    """The first key that each row may see; S, which is none, beyond the last row."""
    first = tl.load(START + row * start_t, mask=row < T, other=0)
    return tl.where(row < T, tl.minimum(tl.maximum(first, 0), S), S).to(tl.int32)


@triton.jit(do_not_specialize=LENGTHS)
def tinylm_attention_forward(
    Q, K, V, START, OUT, LSE, scale_log2, heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, start_b, start_t,
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
    begin = 0
    first = row
    if START is not None:
        first = first_keys(START + b * start_b, row, T, S, start_t)
        begin = tl.min(first, 0) // BLOCK_S * BLOCK_S

    top = tl.full([BLOCK_T], MASKED, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + (tile + 1) * BLOCK_T)
    for start in range(begin, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, column, S, k_s, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        mask = visible(
            row[:, None], column[None, :], first[:, None], T, S, CAUSAL, START is not None
        )
        s = tl.where(mask, s, MASKED)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, column, S, v_s, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    if START is not None:
        live = seeing(top, total)
        total = tl.where(live, total, 1.0)
        out = tl.where(live[:, None], out, 0.0)
        top = tl.where(live, top, 0.0)
    out_head = OUT + (b * T * heads + h) * D
    store_rows(out_head, row, T, heads * D, out / total[:, None], D, BLOCK_D)
    tl.store(LSE + (b * heads + h) * T + row, top + tl.log2(total), mask=row < T)


@triton.jit(do_not_specialize=LENGTHS)
def tinylm_attention_backward(
    Q, K, V, START, OUT, DOUT, LSE, DQ, DK, DV, scale, kv_heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, start_b, start_t,
    do_b, do_t, do_h,
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
    first = at
    if START is not None:
        first = first_keys(START + b * start_b, at, T, S, start_t)
    mask = visible(at[:, None], at[None, :], first[:, None], T, S, CAUSAL, START is not None)
    for member in range(group):
        h = kv_h * group + member
        head = (b * T * heads + h) * D  # of what is dense in the order B, T, H, D
        q = load_rows(Q + b * q_b + h * q_h, at, T, q_t, D, BLOCK_D)
        out = load_rows(OUT + head, at, T, heads * D, D, BLOCK_D)
        dout = load_rows(DOUT + b * do_b + h * do_h, at, T, do_t, D, BLOCK_D)
        lse = tl.load(LSE + (b * heads + h) * T + at, mask=at < T, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        p = tl.exp2(tl.where(mask, s - lse[:, None], MASKED))
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        store_rows(DQ + head, at, T, heads * D, dq, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    kv_head = (b * S * kv_heads + kv_h) * D
    store_rows(DK + kv_head, at, S, kv_heads * D, dk * scale, D, BLOCK_D)
    store_rows(DV + kv_head, at, S, kv_heads * D, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def tinylm_attention_backward_dq(
    Q, K, V, START, OUT, DOUT, LSE, DELTA, DQ, scale, heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, start_b, start_t,
    do_b, do_t, do_h,
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
    begin = 0
    first = row
    if START is not None:
        first = first_keys(START + b * start_b, row, T, S, start_t)
        begin = tl.min(first, 0) // BLOCK_S * BLOCK_S

    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + (tile + 1) * BLOCK_T)
    for start in range(begin, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, column, S, k_s, D, BLOCK_D)
        v = load_rows(V, column, S, v_s, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        mask = visible(
            row[:, None], column[None, :], first[:, None], T, S, CAUSAL, START is not None
        )
        p = tl.exp2(tl.where(mask, s - lse[:, None], MASKED))
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(DQ + head, row, T, heads * D, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def tinylm_attention_backward_dkdv(
    Q, K, V, START, DOUT, LSE, DELTA, DK, DV, scale, kv_heads, group, T, S,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, start_b, start_t,
    do_b, do_t, do_h,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of keys, over all queries that see them.

    Scores are computed transposed, so that no tile has to be turned around before a product.
    """
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    heads = kv_heads * group
    key = tl.program_id(1) * BLOCK_S
    column = key + tl.arange(0, BLOCK_S)
    k = load_rows(K + b * k_b + kv_h * k_h, column, S, k_s, D, BLOCK_D)
    v = load_rows(V + b * v_b + kv_h * v_h, column, S, v_s, D, BLOCK_D)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, key - (S - T)) // BLOCK_T * BLOCK_T
    end = T
    if START is not None:
        START += b * start_b
        end = begin
        for at in range(begin, T, SEARCHED):
            row = at + tl.arange(0, SEARCHED)
            sees = first_keys(START, row, T, S, start_t) < tl.minimum(key + BLOCK_S, S)
            end = tl.maximum(end, tl.max(tl.where(sees, row + 1, 0), 0))
    for member in range(group):
        h = kv_h * group + member
        for start in range(begin, end, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            rows = (b * heads + h) * T + row
            q = load_rows(Q + b * q_b + h * q_h, row, T, q_t, D, BLOCK_D)
            dout = load_rows(DOUT + b * do_b + h * do_h, row, T, do_t, D, BLOCK_D)
            lse = tl.load(LSE + rows, mask=row < T, other=0.0)
            delta = tl.load(DELTA + rows, mask=row < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            first = row
            if START is not None:
                first = first_keys(START, row, T, S, start_t)
            mask = (row < T)[None, :] & visible(
                row[None, :], column[:, None], first[None, :], T, S, CAUSAL, START is not None
            )
            p = tl.exp2(tl.where(mask, s - lse[None, :], MASKED))
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    kv_head = (b * S * kv_heads + kv_h) * D
    store_rows(DK + kv_head, column, S, kv_heads * D, dk * scale, D, BLOCK_D)
    store_rows(DV + kv_head, column, S, kv_heads * D, dv, D, BLOCK_D)
