"""Cross-entropy of a linear layer's outputs without ever holding all of them.

At a vocabulary of 10,000 the N × V logits dwarf everything else in a small model's training
step. So rows are taken a chunk at a time, and a chunk's gradients are computed while its logits
are still in cache (the idea of Cut Your Losses, Wijmans et al. 2024, and of Liger Kernel).
"""

import math
from typing import Any, NamedTuple

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

# Rows of logits alive at once. On a CPU 256 × 10,000 fp32 (10 MB) is the fastest of 64 … 2,048;
# a GPU wants larger products.
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}


class Terms(NamedTuple):
    """What is computed, beyond the plain cross-entropy of all rows."""

    ignore_index: int
    softcap: float | None
    z_loss: float
    dtype: torch.dtype  # of the matrix products
    compiled: bool = False  # whether the passes over logits run in C++


def linear_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    *,
    bias_V: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``-log softmax(z)[target]`` in nats, with ``z = h weightᵀ + bias``, over the rows.

    Matrix products run in autocast's dtype if it is on, else in the dtype of ``h_NC``; softmax
    and sums are fp32 (fp64 if all is). Rows whose target is ``ignore_index`` count nowhere; with
    no row left the mean is NaN and its gradients are 0, as in torch. Targets are whole numbers of
    any dtype; one that is outside the vocabulary raises on a CPU, and gives NaN in Triton.

    Args:
        softcap: ``z`` becomes ``softcap · tanh(z / softcap)`` (Gemma Team 2024).
        z_loss: each row's loss grows by ``z_loss · (log Σ exp z)²`` (Chowdhery et al. 2022).
        reduction: ``"mean"`` of the rows that count, ``"sum"``, or ``"none"``: loss_N, 0 in
            rows that do not count.
        backend: ``"triton"``, ``"c++"``, ``"chunked"`` or ``"reference"``; chosen by device if
            None.

    Raises:
        InputError: the shapes do not belong together, or are on several devices, or an option is
            out of its range.
    """
    _check(h_NC, weight_VC, targets_N, bias_V, softcap, reduction)
    check_devices("linear_cross_entropy", h_NC, weight_VC, targets_N, bias_V)
    targets_N = targets_N.long()
    kind = call_kind(h_NC, weight_VC)
    name = implementation("linear_cross_entropy", h_NC.device, backend, kind)
    terms = Terms(ignore_index, softcap, z_loss, autocast_dtype(h_NC))
    inputs = h_NC, weight_VC, bias_V, targets_N
    if name == "triton":
        from tinylm.kernels.triton import linear_cross_entropy as kernels

        refusal = kernels.refusal(h_NC, weight_VC, bias_V, terms.dtype)
        if refusal is None:
            return _reduced(kernels.loss_N(*inputs, *terms[:4]), targets_N, ignore_index, reduction)
        name = torch_instead("linear_cross_entropy", h_NC.device.type, refusal)
    if name == "c++":
        from tinylm.kernels.compiled import linear_cross_entropy as compiled

        refusal = compiled.cross_entropy_refusal(h_NC, terms.dtype, softcap)
        terms = terms._replace(compiled=refusal is None)
        if refusal is not None:
            name = torch_instead_of_compiled(
                "linear_cross_entropy", h_NC.device.type, refusal, backend
            )
    if name == "reference" or len(weight_VC) == 0:
        return _reduced(_reference(*inputs, terms), targets_N, ignore_index, reduction)
    loss: Tensor
    if reduction == "none" or not torch.is_grad_enabled():
        loss = _ChunkedRows.apply(*inputs, terms)  # type: ignore[no-untyped-call]
        return _reduced(loss, targets_N, ignore_index, reduction)
    if reduction == "sum" or terms.dtype == torch.float16:  # in which softmax / N would underflow
        loss = _ChunkedSum.apply(*inputs, None, terms)  # type: ignore[no-untyped-call]
        return _mean(loss, targets_N, ignore_index) if reduction == "mean" else loss
    count = (targets_N != ignore_index).sum()
    share = 1 / count.clamp(min=1).to(statistics_dtype(h_NC))
    loss = _ChunkedSum.apply(*inputs, share, terms)  # type: ignore[no-untyped-call]
    return loss.where(count > 0, math.nan)


def call_kind(h_NC: Tensor, weight_VC: Tensor) -> str:
    """What the time of a call hangs on, for `tinylm.kernels.dispatch.select`."""
    (N, C), V = h_NC.shape, weight_VC.shape[0]
    sizes = at_most("C", C, 128, 256), at_most("N", N, 1024), at_most("V", V, 4096)
    return ", ".join((dtype_name(autocast_dtype(h_NC)), *sizes))


def _check(
    h_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    reduction: str,
) -> None:
    if h_NC.dim() != 2 or weight_VC.dim() != 2 or h_NC.shape[1] != weight_VC.shape[1]:
        shapes = f"{tuple(h_NC.shape)} and {tuple(weight_VC.shape)}"
        raise InputError(f"linear_cross_entropy of shapes {shapes}: needs (N, C) and (V, C)")
    if targets_N.shape != h_NC.shape[:1] or (
        bias_V is not None and bias_V.shape != weight_VC.shape[:1]
    ):
        raise InputError("linear_cross_entropy needs one target per row and one bias per token")
    if targets_N.is_floating_point():
        raise InputError(f"the targets are {targets_N.dtype}; they have to be ids of tokens")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap is {softcap}; it must be above 0, or None")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is {reduction!r}; choose mean, sum or none")


def _reduced(loss_N: Tensor, targets_N: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_N
    total = loss_N.sum()
    return total if reduction == "sum" else _mean(total, targets_N, ignore_index)


def _mean(total: Tensor, targets_N: Tensor, ignore_index: int) -> Tensor:
    """Of the rows that count. A division by 0 would make gradients of 0 times infinity."""
    count = (targets_N != ignore_index).sum()
    return (total / count.clamp(min=1)).where(count > 0, math.nan)


def _reference(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, targets_N: Tensor, terms: Terms
) -> Tensor:
    """loss_N, as plainly as can be."""
    bias_V = None if bias_V is None else bias_V.to(terms.dtype)
    logits_NV = wide(F.linear(h_NC.to(terms.dtype), weight_VC.to(terms.dtype), bias_V))
    if terms.softcap is not None:
        logits_NV = terms.softcap * torch.tanh(logits_NV / terms.softcap)
    loss_N = F.cross_entropy(
        logits_NV, targets_N, ignore_index=terms.ignore_index, reduction="none"
    )
    if not terms.z_loss:
        return loss_N
    penalty_N = terms.z_loss * torch.logsumexp(logits_NV, dim=-1).square()
    return loss_N + penalty_N.where(targets_N != terms.ignore_index, 0.0)


class _ChunkedSum(torch.autograd.Function):
    """``share`` of the sum of losses, and gradients, in one pass over the chunks.

    Backward only scales what forward found, and not even that where the gradient is 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        share: Tensor | None,
        terms: Terms,
    ) -> Tensor:
        inputs, need = (h_NC, weight_VC, bias_V, targets_N), ctx.needs_input_grad[:3]
        dloss_N = None if share is None else share.expand(len(h_NC))
        loss_N, gradients = _whole(*inputs, terms, need, dloss_N) or _chunked(
            *inputs, terms, need, dloss_N
        )
        ctx.save_for_backward(*gradients)
        total = loss_N.sum()
        return total if share is None else total * share

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if scale.device.type == "cpu" and not torch.compiler.is_compiling() and scale == 1:
            return *ctx.saved_tensors, None, None, None
        scaled = (None if g is None else (g * scale).to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None


class _ChunkedRows(torch.autograd.Function):
    """Each row's loss; backward computes the logits again, for only then its gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        terms: Terms,
    ) -> Tensor:
        ctx.save_for_backward(h_NC, weight_VC, bias_V, targets_N)
        ctx.terms = terms
        return _chunked(h_NC, weight_VC, bias_V, targets_N, terms, (False,) * 3)[0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        # In fp16, gradients of a mean over many rows underflow; between -1 and 1 they do not.
        dloss_N = grad_outputs[0]
        tiny = torch.finfo(dloss_N.dtype).tiny
        scale = dloss_N.abs().amax().clamp(min=tiny) if len(dloss_N) else dloss_N.new_ones(())
        h_NC, weight_VC, bias_V, targets_N = ctx.saved_tensors
        inputs = h_NC, weight_VC, bias_V, targets_N
        _, gradients = _chunked(*inputs, ctx.terms, need, dloss_N / scale)
        return *(None if g is None else (g * scale).to(g.dtype) for g in gradients), None, None


def _whole(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    terms: Terms,
    need: tuple[bool, ...],
    dloss_N: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]] | None:
    """As `_chunked`, all of it in C++; None where that does not take it."""
    if not terms.compiled or not need[0] or not need[1] or need[2] != (bias_V is not None):
        return None
    from tinylm.kernels.compiled import linear_cross_entropy as compiled

    if compiled.head_refusal(h_NC, terms.dtype) is not None:
        return None
    inputs = h_NC.to(terms.dtype), weight_VC, bias_V, targets_N, dloss_N
    loss_N, *gradients, right = compiled.head_cross_entropy(
        *inputs, terms.ignore_index, terms.z_loss
    )
    if not right:
        return None
    dh, dw = (g.to(x.dtype) for g, x in zip(gradients, (h_NC, weight_VC), strict=False))
    return loss_N, [dh, dw, None if bias_V is None else gradients[2].to(bias_V.dtype)]


def _chunked(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    terms: Terms,
    need: tuple[bool, ...],
    dloss_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """loss_N, and those of (dh, dweight, dbias) that are needed, for gradients of 1 if None."""
    with torch.autocast(h_NC.device.type, enabled=False):
        w = weight_VC.to(terms.dtype)
        b = None if bias_V is None else bias_V.to(terms.dtype)
        dh = torch.zeros_like(h_NC) if need[0] else None
        dw = torch.zeros_like(wide(weight_VC)) if need[1] else None
        db = torch.zeros_like(wide(bias_V)) if need[2] and bias_V is not None else None
        loss_N = wide(w.new_empty(0)).new_zeros(len(h_NC))
        rows = CHUNK_ROWS.get(h_NC.device.type, 4096)
        unshifted = _can_be_unshifted(h_NC, terms) and any(need) and not terms.compiled
        # Written again and again: large new tensors cost page faults.
        memory = w.new_empty(min(rows, len(h_NC)), len(w)) if terms.compiled else None
        for start in range(0, len(h_NC), rows):
            part = slice(start, start + rows)
            h = h_NC[part].to(terms.dtype)
            weights = None if dloss_N is None else dloss_N[part]
            inputs = h, w, b, targets_N[part], weights, terms
            if memory is not None:
                chunk = _chunk_compiled(memory[: len(h)], *inputs, any(need))
            else:
                chunk = (unshifted and _chunk_unshifted(*inputs)) or _chunk(*inputs, any(need))
            loss_N[part], dlogits, scale = chunk
            if dlogits is None:
                continue
            if db is not None:
                db += (scale.to(dlogits.dtype).t() @ dlogits).squeeze(0)
            dlogits = dlogits.to(terms.dtype)
            if dh is not None:
                dh[part] = (dlogits @ w) * scale
            if dw is not None:
                _accumulate(dw, dlogits.t() @ (h * scale).to(terms.dtype))
    return loss_N, [
        dh,
        None if dw is None else dw.to(weight_VC.dtype),
        None if db is None or bias_V is None else db.to(bias_V.dtype),
    ]


def _chunk(
    h_RC: Tensor,
    w_VC: Tensor,
    b_V: Tensor | None,
    targets_R: Tensor,
    dloss_R: Tensor | None,
    terms: Terms,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """loss_R, dlogits_RV and scale_R1 of R rows, in place of their logits wherever possible.

    The gradient of the logits is ``scale · dlogits``.
    """
    keep = targets_R != terms.ignore_index
    target = targets_R.where(keep, 0)[:, None]
    logits = wide(F.linear(h_RC, w_VC, b_V))
    slope = None
    if terms.softcap is not None:
        logits = logits.div_(terms.softcap).tanh_()
        slope = 1 - logits.square() if need_dlogits else None
        logits = logits.mul_(terms.softcap)
    # One pass of exponentials serves both the loss and the gradient.
    top = logits.amax(dim=-1, keepdim=True)
    own = logits.gather(1, target) - top
    exponentials = logits.sub_(top).exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    loss = sums.log() - own
    lse = sums.log() + top if terms.z_loss else None
    if lse is not None:
        loss = loss + terms.z_loss * lse.square()
    loss_R = loss.squeeze(1) * keep
    scale = _row_weights(keep, dloss_R, logits.dtype)
    if not need_dlogits:
        return loss_R, None, scale
    # d loss / d logits = softmax · (1 + 2 z_loss lse) - one-hot.
    factor = 1 / sums if lse is None else (1 + 2 * terms.z_loss * lse) / sums
    dlogits = exponentials.mul_(factor)
    dlogits.scatter_add_(1, target, -torch.ones_like(own))
    return loss_R, dlogits if slope is None else dlogits.mul_(slope), scale


def _chunk_unshifted(
    h_RC: Tensor,
    w_VC: Tensor,
    b_V: Tensor | None,
    targets_R: Tensor,
    dloss_R: Tensor | None,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `_chunk`, of plain terms in bf16 on a CPU, with fewer passes over the logits.

    bf16 reaches as far as fp32, so the exponentials of usual logits need neither a shift by the
    largest one nor fp32, only sums in fp32; the division by the sums is left to the rows of the
    products. None, for `_chunk` to do it, where a sum comes near the ends of that range.
    """
    keep = targets_R != terms.ignore_index
    target = targets_R.where(keep, 0)[:, None]
    logits = F.linear(h_RC, w_VC, b_V)
    own_logit = logits.gather(1, target).squeeze(1).float()
    exponentials = logits.exp_()
    # In few rows at a time, for torch copies into fp32 what it sums in fp32.
    parts = torch.split(exponentials, 32)
    sums = torch.cat([part.sum(dim=-1, dtype=torch.float32) for part in parts])
    if not bool(((sums > 1e-30) & (sums < 1e30)).all()):
        return None
    # The target's own term unrounded: no loss is below 0, nor off by its rounding.
    own_share = exponentials.gather(1, target).squeeze(1).float()
    loss_R = ((sums - own_share).clamp(min=0) + own_logit.exp()).log() - own_logit
    exponentials.scatter_(1, target, (own_share - sums).to(exponentials.dtype)[:, None])
    return loss_R * keep, exponentials, _row_weights(keep, dloss_R, sums.dtype) / sums[:, None]


def _chunk_compiled(
    logits: Tensor,
    h_RC: Tensor,
    w_VC: Tensor,
    b_V: Tensor | None,
    targets_R: Tensor,
    dloss_R: Tensor | None,
    terms: Terms,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `_chunk`, without softcap, in the memory ``logits``: C++ makes their passes one.

    The division by the sums is left to the rows of the products, as in `_chunk_unshifted`.
    """
    from tinylm.kernels.compiled.linear_cross_entropy import exponentials_

    keep = targets_R != terms.ignore_index
    target = targets_R.where(keep, 0)[:, None]
    if b_V is None:
        torch.mm(h_RC, w_VC.t(), out=logits)
    else:
        torch.addmm(b_V, h_RC, w_VC.t(), out=logits)
    own_logit = logits.gather(1, target).squeeze(1).float()  # raises if there is none
    top, sums = exponentials_(logits)
    own_logit -= top
    loss_R = sums.log() - own_logit
    factor = torch.ones_like(sums)
    if terms.z_loss:
        lse = sums.log() + top
        loss_R = loss_R + terms.z_loss * lse.square()
        factor += 2 * terms.z_loss * lse
    weights = _row_weights(keep, dloss_R, sums.dtype)
    if not need_dlogits:
        return loss_R * keep, None, weights
    # d loss / d logits = factor · softmax - one-hot = factor / sum · (exponentials - one-hot · …).
    own_exponential = own_logit.exp() - sums / factor
    logits.scatter_(1, target, own_exponential.to(logits.dtype)[:, None])
    return loss_R * keep, logits, weights * (factor / sums)[:, None]


def _accumulate(total: Tensor, part: Tensor) -> None:
    """``total += part``. torch widens all of the part first; its pieces fit into a cache."""
    rows = 1024 if total.device.type == "cpu" else len(total)
    pieces = zip(torch.split(total, rows), torch.split(part, rows), strict=True)
    for total_rows, part_rows in pieces:
        total_rows += part_rows


def _can_be_unshifted(h_NC: Tensor, terms: Terms) -> bool:
    plain = terms.softcap is None and not terms.z_loss
    if torch.compiler.is_compiling():  # which cannot look at a sum and decide
        return False
    return plain and terms.dtype == torch.bfloat16 and h_NC.device.type == "cpu"


def _row_weights(keep_R: Tensor, dloss_R: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight_R1: what each row's loss counts in the sum."""
    weight_R = keep_R.to(dtype) if dloss_R is None else keep_R * dloss_R.to(dtype)
    return weight_R[:, None]
