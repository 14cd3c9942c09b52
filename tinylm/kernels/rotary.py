"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Qwen."""

from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.kernels.dispatch import (
    at_most,
    dtype_name,
    implementation,
    torch_instead,
    torch_instead_of_compiled,
)
from tinylm.kernels.norm import rms_norm


def rotary_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos_TD and sin_TD (fp32) for positions 0 … max_seq_len - 1.

    Position t turns the pair (d, d + D/2) by the angle ``t * theta ** (-2 d / D)``.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    angles_TD = torch.cat((angles, angles), dim=-1)
    return angles_TD.cos().float(), angles_TD.sin().float()


def apply_rotary(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turns each head vector by the angle of its position; keeps the dtype of ``x_BHTD``."""
    out_BHTD: Tensor = _Rotary.apply(x_BHTD, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return out_BHTD


def norm_rotary(
    x_BTHD: Tensor,
    weight_HD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """`rms_norm` of each head by its own weight, then `apply_rotary`; in the order (B, T, H, D).

    Args:
        backend: ``"triton"``, ``"c++"`` or ``"separate"``: one after the other, each as it runs by
            itself.

    Raises:
        InputError: the tables are not of the T positions.
    """
    if len(cos_TD) != x_BTHD.shape[1]:
        positions = f"{x_BTHD.shape[1]} positions and tables of {len(cos_TD)}"
        raise InputError(f"norm_rotary of {positions}: these do not belong together")
    name = implementation("norm_rotary", x_BTHD.device, backend, call_kind(x_BTHD))
    if name == "triton":
        from tinylm.kernels.triton import rotary as kernels

        refusal = kernels.refusal(x_BTHD, weight_HD)
        if refusal is None:
            return kernels.norm_rotary(x_BTHD, weight_HD, cos_TD, sin_TD, eps)
        torch_instead("norm_rotary", x_BTHD.device.type, refusal)
    elif name == "c++":
        from tinylm.kernels.compiled import rotary as compiled
        from tinylm.kernels.compiled.common import numbers_refusal

        refusal = numbers_refusal(x_BTHD)
        if refusal is None:
            inputs = x_BTHD.flatten(0, 1), weight_HD, cos_TD, sin_TD, eps
            out_NHD: Tensor = compiled.norm_rotary(*inputs)[0]
            return out_NHD.view(x_BTHD.shape)
        torch_instead_of_compiled("norm_rotary", x_BTHD.device.type, refusal, backend)
    normed_BHTD = rms_norm(x_BTHD, weight_HD, eps=eps).transpose(1, 2)
    return apply_rotary(normed_BHTD, cos_TD, sin_TD).transpose(1, 2)


def call_kind(x_BTHD: Tensor) -> str:
    """What the time of a `norm_rotary` hangs on, for `tinylm.kernels.dispatch.select`."""
    return f"{dtype_name(x_BTHD.dtype)}, {at_most('D', x_BTHD.shape[-1], 32, 64, 256)}"


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate(x_BHTD, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos_TD, -sin_TD), None, None


def _rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x cos + (x with its halves exchanged) (-sin, sin)."""
    half = x_BHTD.shape[-1] // 2
    signed_TD = torch.cat((-sin_TD[:, :half], sin_TD[:, half:]), dim=-1)
    # Tables laid out as x is, for every head: then torch goes over all heads in long vectors.
    cos, signed = (torch.empty_like(x_BHTD[:1]).copy_(table) for table in (cos_TD, signed_TD))
    return (x_BHTD * cos).add_(x_BHTD.roll(half, dims=-1).mul_(signed))
