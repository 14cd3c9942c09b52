"""Cross-entropy of a linear layer's outputs without ever holding all of them.

At a vocabulary of 10,000 the N × V logits dwarf everything else in a small model's training
step. So rows are taken a chunk at a time, and a chunk's gradients are computed while its logits
are still in cache (the idea of Cut Your Losses, Wijmans et al. 2024, and of Liger Kernel).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.kernels.dispatch import autocast_dtype, implementation, torch_instead, wide

# Rows of logits alive at once. On a CPU 256 × 10,000 fp32 (10 MB) is the fastest of 64 … 2,048;
# a GPU wants larger products.
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}


def linear_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Mean over N of ``-log softmax(h weightᵀ + bias)[target]``, in nats.

    Matrix products run in autocast's dtype if it is on, else in the dtype of ``h_NC``; softmax
    and sums are fp32 (fp64 if all is). Rows whose target is ``ignore_index`` count nowhere; with
    no row left the loss is NaN, as in torch.

    Args:
        backend: ``"triton"``, ``"chunked"`` or ``"reference"``; chosen by device if None.
    """
    device_type = h_NC.device.type
    name = implementation("linear_cross_entropy", device_type, backend)
    dtype = autocast_dtype(h_NC)
    if name == "triton":
        from tinylm.kernels.triton import linear_cross_entropy as kernels

        refusal = kernels.refusal(h_NC, weight_VC, bias_V, dtype)
        if refusal is None:
            return kernels.linear_cross_entropy(
                h_NC, weight_VC, targets_N, bias_V, ignore_index, dtype
            )
        name = torch_instead("linear_cross_entropy", device_type, refusal)
    if name == "reference":
        logits_NV = wide(F.linear(h_NC, weight_VC, bias_V))
        return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index)
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        h_NC, weight_VC, bias_V, targets_N, ignore_index, dtype
    )
    return loss


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales what forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(h_NC.device.type, enabled=False):
            return _forward(ctx, h_NC, weight_VC, bias_V, targets_N, ignore_index, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0] / ctx.saved_tensors[3]
        dh, dweight, dbias = (
            None if g is None else (g * scale).to(g.dtype) for g in ctx.saved_tensors[:3]
        )
        return dh, dweight, dbias, None, None, None


def _forward(
    ctx: Any,
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    need_h, need_w, need_b = ctx.needs_input_grad[:3]
    dh = torch.zeros_like(h_NC) if need_h else None
    dw = torch.zeros_like(wide(weight_VC)) if need_w else None
    db = torch.zeros_like(wide(bias_V)) if need_b and bias_V is not None else None
    w = weight_VC.to(dtype)
    b = None if bias_V is None else bias_V.to(dtype)

    keep_N = targets_N != ignore_index
    count = keep_N.sum()
    total = h_NC.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
    rows = CHUNK_ROWS.get(h_NC.device.type, 4096)
    for start in range(0, h_NC.shape[0], rows):
        part = slice(start, start + rows)
        h, keep = h_NC[part].to(dtype), keep_N[part]
        target = targets_N[part].where(keep, 0)[:, None]
        logits = wide(F.linear(h, w, b))
        # One pass of exponentials serves both the loss and the gradient.
        top = logits.amax(dim=-1, keepdim=True)
        own = logits.gather(1, target) - top
        exponentials = logits.sub_(top).exp_()
        sums = exponentials.sum(dim=-1, keepdim=True)
        total += ((sums.log() - own).squeeze(1) * keep).sum()
        if not (need_h or need_w or need_b):
            continue
        # d loss / d logits = (softmax - one-hot) / count, built in place of the logits. The
        # division waits for backward: softmax / count would underflow in fp16.
        dlogits = exponentials.mul_(keep[:, None] / sums)
        dlogits.scatter_add_(1, target, -keep[:, None].to(dlogits.dtype))
        if db is not None:
            db += dlogits.sum(0)
        dlogits = dlogits.to(dtype)
        if dh is not None:
            dh[part] = dlogits @ w
        if dw is not None:
            dw += dlogits.t() @ h
    ctx.save_for_backward(
        dh,
        None if dw is None else dw.to(weight_VC.dtype),
        None if db is None or bias_V is None else db.to(bias_V.dtype),
        count,
    )
    return total / count
