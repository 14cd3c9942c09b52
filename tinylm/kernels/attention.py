"""Scaled dot-product attention (Vaswani et al. 2017), causal unless told otherwise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.kernels.dispatch import autocast_dtype, implementation, statistics_dtype, torch_instead

# A finite stand-in for minus infinity: a row that is masked everywhere stays free of NaN.
MASKED = -1e30


def causal_attention(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    start_B: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, each query seeing the keys up to its own position.

    The T queries are the last T of the S positions, so that cached decoding (T = 1, S long) and
    training (T = S) are the same call. Keys and values may have fewer heads than queries, each
    then serving ``H / H_kv`` consecutive query heads (Ainslie et al. 2023).

    Args:
        scale: factor on the scores, ``1 / sqrt(D)`` if None.
        causal: False lets every query see every key.
        start_B: first real key of each sequence (left padding); queries before it give zeros.
        backend: ``"triton"``, ``"sdpa"`` or ``"matmul"``; chosen by device if None.

    Returns:
        out_BHTD in the dtype of ``q_BHTD``.
    """
    scale = 1.0 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    device_type = q_BHTD.device.type
    name = implementation("causal_attention", device_type, backend)
    if name == "triton":
        from tinylm.kernels.triton import attention as kernels

        dtype = autocast_dtype(q_BHTD)
        qkv = q_BHTD.to(dtype), k_BHSD.to(dtype), v_BHSD.to(dtype)
        refusal = kernels.refusal(*qkv, start_B)
        if refusal is None:
            return kernels.attention(*qkv, scale, causal)
        name = torch_instead("causal_attention", device_type, refusal)
    groups = q_BHTD.shape[1] // k_BHSD.shape[1]
    if groups > 1:
        k_BHSD, v_BHSD = (x.repeat_interleave(groups, dim=1) for x in (k_BHSD, v_BHSD))
    if name == "sdpa" and start_B is None:
        return _sdpa(q_BHTD, k_BHSD, v_BHSD, scale, causal)
    return _matmul(q_BHTD, k_BHSD, v_BHSD, scale, _mask(q_BHTD, k_BHSD, causal, start_B))


def _mask(q_BHTD: Tensor, k_BHSD: Tensor, causal: bool, start_B: Tensor | None) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, T, S); None when everywhere."""
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    if start_B is None and (not causal or T == 1):
        return None
    key_S = torch.arange(S, device=q_BHTD.device)
    query_T = key_S[S - T :]
    mask_TS = key_S <= query_T[:, None] if causal else torch.ones_like(key_S, dtype=torch.bool)
    return mask_TS if start_B is None else mask_TS & (key_S >= start_B[:, None, None, None])


def _matmul(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """The plain reference. The softmax is fp32 whatever the inputs are."""
    scores_BHTS = (q_BHTD * scale) @ k_BHSD.transpose(-1, -2)
    if mask is not None:
        lowest = max(MASKED, torch.finfo(scores_BHTS.dtype).min)
        bias = torch.zeros_like(mask, dtype=scores_BHTS.dtype).masked_fill_(~mask, lowest)
        scores_BHTS = scores_BHTS + bias
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=statistics_dtype(scores_BHTS))
    if mask is not None and mask.dim() > 2:  # left padding: rows that see nothing give zeros
        weights_BHTS = weights_BHTS * mask.any(dim=-1, keepdim=True)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


def _sdpa(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, causal: bool) -> Tensor:
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    if causal and 1 < T < S:  # is_causal aligns to the first key, we to the last
        mask = _mask(q_BHTD, k_BHSD, causal, None)
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSD, is_causal=causal and T == S, scale=scale
    )
