"""Scaled dot-product attention (Vaswani et al. 2017), causal unless told otherwise."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinylm.errors import InputError
from tinylm.kernels.dispatch import (
    at_most,
    autocast_dtype,
    check_devices,
    dtype_name,
    implementation,
    statistics_dtype,
    torch_instead,
    torch_instead_of_compiled,
    wide,
)

# A finite stand-in for minus infinity: a row that is masked everywhere stays free of NaN.
MASKED = -1e30
# Queries at once that count as decoding: more are the beginning of a text, or part of one.
MOST_DECODED = 4


def causal_attention(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    scale: float | None = None,
    *,
    causal: bool = True,
    start_BT: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, each query seeing the keys up to its own position.

    The T queries are the last T of the S positions, so that cached decoding (T = 1, S long) and
    training (T = S) are the same call. Keys and values may have fewer heads than queries, each
    then serving ``H / H_kv`` consecutive query heads (Ainslie et al. 2023). Everything is computed
    in autocast's dtype if it is on, else in that of ``q_BHTD``; the softmax in fp32.

    Args:
        scale: factor on the scores, ``1 / sqrt(D)`` if None.
        causal: False lets every query see every key from its start on.
        start_BT: the first key that each query may see, whole numbers in a shape that expands to
            (B, T): the start of the query's document (`document_starts`), or, as (B, 1), of each
            sequence after its left padding. A query that sees no key gives zeros.
        backend: ``"triton"``, ``"c++"``, ``"sdpa"``, ``"blocked"`` or ``"matmul"``; chosen by
            device if None.

    Returns:
        out_BHTD in the dtype of the products.

    Raises:
        InputError: the shapes do not belong together, or are on several devices.
    """
    _check(q_BHTD, k_BHSD, v_BHSD)
    check_devices("causal_attention", q_BHTD, k_BHSD, v_BHSD, start_BT)
    scale = 1.0 / math.sqrt(max(1, q_BHTD.shape[-1])) if scale is None else scale
    dtype = autocast_dtype(q_BHTD)
    q_BHTD, k_BHSD, v_BHSD = (x.to(dtype) for x in (q_BHTD, k_BHSD, v_BHSD))
    start_BT = None if start_BT is None else _expanded(start_BT, q_BHTD)
    kind = call_kind(q_BHTD, k_BHSD, start_BT)
    name = implementation("causal_attention", q_BHTD.device, backend, kind)
    if name == "triton":
        from tinylm.kernels.triton import attention as kernels

        refusal = kernels.refusal(q_BHTD, k_BHSD, v_BHSD)
        if refusal is None:
            return kernels.attention(q_BHTD, k_BHSD, v_BHSD, start_BT, scale, causal)
        name = torch_instead("causal_attention", q_BHTD.device.type, refusal)
    groups = q_BHTD.shape[1] // k_BHSD.shape[1]
    if groups > 1:
        k_BHSD, v_BHSD = (x.repeat_interleave(groups, dim=1) for x in (k_BHSD, v_BHSD))
    if name == "c++":
        from tinylm.kernels.compiled import attention as compiled

        dtype = autocast_dtype(q_BHTD)
        q, k, v = (x.to(dtype) for x in (q_BHTD, k_BHSD, v_BHSD))
        refusal = compiled.attention_refusal(q, k, causal and start_BT is None)
        if refusal is None:
            out_BHTD: Tensor = compiled.causal_heads(q, k, v, scale)[0]
            return out_BHTD
        name = torch_instead_of_compiled("causal_attention", q.device.type, refusal, backend)
    run = {"sdpa": _sdpa, "blocked": _blocked, "matmul": _matmul}[name]
    return run(q_BHTD, k_BHSD, v_BHSD, scale, causal, start_BT)


def call_kind(q_BHTD: Tensor, k_BHSD: Tensor, start_BT: Tensor | None) -> str:
    """What the time of a call hangs on, for `tinylm.kernels.dispatch.select`."""
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    decoding = T < S and T <= MOST_DECODED
    place = "decoding" if decoding else at_most("T", S, 64, 512)
    documents = ", documents" if start_BT is not None and not decoding else ""
    width = at_most("D", q_BHTD.shape[3], 32, 64, 128)
    return f"{dtype_name(autocast_dtype(q_BHTD))}, {place}, {width}{documents}"


def document_starts(ids_BT: Tensor, end_id: int) -> Tensor:
    """start_BT (int32) of packed documents that each end with ``end_id``, for `causal_attention`.

    The end belongs to the document that it ends.
    """
    place_T = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device, dtype=torch.int32)
    after_BT = torch.where(ids_BT == end_id, place_T, 0).cummax(dim=1).values.int()
    return F.pad(after_BT, (1, 0))[:, :-1]


def _check(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
    fits = q_BHTD.dim() == k_BHSD.dim() == 4 and k_BHSD.shape == v_BHSD.shape
    if not fits or q_BHTD.shape[::3] != k_BHSD.shape[::3]:
        shapes = " and ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BHSD, v_BHSD))
        needs = "needs (B, H, T, D) and twice (B, H, S, D)"
        if fits:
            needs = "batch and head dimension must be the same"
        raise InputError(f"attention of shapes {shapes}: {needs}")
    (_, H, T, _), (_, H_kv, S, _) = q_BHTD.shape, k_BHSD.shape
    if not H or not H_kv or H % H_kv:
        raise InputError(f"attention of {H} query heads on {H_kv} key heads: not a multiple")
    if T > S:
        raise InputError(f"attention of {T} queries on {S} keys: the queries are the last of them")


def _expanded(start_BT: Tensor, q_BHTD: Tensor) -> Tensor:
    B, _, T, _ = q_BHTD.shape
    if start_BT.is_floating_point():
        raise InputError(f"start_BT is {start_BT.dtype}; it holds places, which are whole numbers")
    try:
        return start_BT.expand(B, T)
    except RuntimeError:
        raise InputError(
            f"start_BT of shape {tuple(start_BT.shape)} does not expand to {(B, T)}; "
            "left padding is (B, 1)"
        ) from None


def _mask(q_BHTD: Tensor, k_BHSD: Tensor, causal: bool, start_BT: Tensor | None) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, T, S); None when everywhere."""
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    if start_BT is None and (not causal or T == 1):
        return None
    key_S = torch.arange(S, device=q_BHTD.device)
    query_T = key_S[S - T :]
    mask_TS = key_S <= query_T[:, None] if causal else torch.ones_like(key_S, dtype=torch.bool)
    return mask_TS if start_BT is None else mask_TS & (key_S >= start_BT[:, None, :, None])


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores instead of masking them."""
    lowest = max(MASKED, torch.finfo(dtype).min)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)


def _matmul(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool,
    start_BT: Tensor | None,
) -> Tensor:  # fmt: skip
    """The plain reference. The softmax is fp32 whatever the inputs are."""
    mask = _mask(q_BHTD, k_BHSD, causal, start_BT)
    scores_BHTS = (q_BHTD * scale) @ k_BHSD.transpose(-1, -2)
    if mask is not None:
        scores_BHTS = scores_BHTS + _bias(mask, scores_BHTS.dtype)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=statistics_dtype(scores_BHTS))
    if mask is not None and start_BT is not None:  # rows that see nothing give zeros
        weights_BHTS = weights_BHTS * mask.any(dim=-1, keepdim=True)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


# Queries taken together. Larger blocks compute more of what the mask hides, smaller ones make
# products too small to be fast: of 32, 64, 128 and 256, this is the fastest at head dimension 32.
BLOCK_QUERIES = 64


def _blocked(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool,
    start_BT: Tensor | None,
) -> Tensor:  # fmt: skip
    """Blocks of queries, each with the keys up to its own last position only.

    Whatever else there is to mask goes to `_matmul`.
    """
    if not causal or start_BT is not None or q_BHTD.shape[2] != k_BHSD.shape[2]:
        return _matmul(q_BHTD, k_BHSD, v_BHSD, scale, causal, start_BT)
    out_BHTD: Tensor = _Blocked.apply(q_BHTD, k_BHSD, v_BHSD, scale)  # type: ignore[no-untyped-call]
    return out_BHTD


class _Blocked(torch.autograd.Function):
    """Keeps the softmax of each block in the dtype of the inputs; inside it is fp32."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> Tensor:
        q, k, v = (q_BHTD * scale).contiguous(), k_BHTD.contiguous(), v_BHTD.contiguous()
        out_BHTD, weights = torch.empty_like(q), []
        for start, end in _blocks(q):
            scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
            below = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril_()
            scores[..., start:] += _bias(below, scores.dtype)
            # In a dtype that is named, for autocast on a GPU would make it fp32.
            weights.append(torch.softmax(scores, dim=-1, dtype=scores.dtype))
            out_BHTD[:, :, start:end] = weights[-1] @ v[:, :, :end]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return out_BHTD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        dout = grad_outputs[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
        for (start, end), p in zip(_blocks(q), weights, strict=True):
            dout_block = dout[:, :, start:end]
            dp = dout_block @ v[:, :, :end].transpose(-1, -2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, start:end] = (ds @ k[:, :, :end]).mul_(ctx.scale)
            dk[:, :, :end] += ds.transpose(-1, -2) @ q[:, :, start:end]
            dv[:, :, :end] += p.transpose(-1, -2) @ dout_block
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q_BHTD: Tensor) -> list[tuple[int, int]]:
    T = q_BHTD.shape[2]
    return [(start, min(start + BLOCK_QUERIES, T)) for start in range(0, T, BLOCK_QUERIES)]


def _sdpa(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool,
    start_BT: Tensor | None,
) -> Tensor:  # fmt: skip
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    if start_BT is None and not (causal and 1 < T < S):
        return F.scaled_dot_product_attention(
            q_BHTD, k_BHSD, v_BHSD, is_causal=causal and T == S, scale=scale
        )
    # is_causal aligns to the first key, we to the last.
    mask = _mask(q_BHTD, k_BHSD, causal, start_BT)
    assert mask is not None
    bias = _bias(mask, q_BHTD.dtype)
    out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=bias, scale=scale)
    return out_BHTD if start_BT is None else out_BHTD * mask.any(dim=-1, keepdim=True)
