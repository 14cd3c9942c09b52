"""Layer norm (Ba et al. 2016) and RMS norm (Zhang and Sennrich 2019), with the residual added."""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinylm.errors import InputError
from tinylm.kernels.dispatch import (
    at_most,
    check_devices,
    dtype_name,
    implementation,
    torch_instead,
    torch_instead_of_compiled,
    wide,
)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: None = None,
    eps: float = 1e-5, *, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor,
    eps: float = 1e-5, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor,
    eps: float = 1e-5, *, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension.

    With ``residual``, the sum ``x + residual`` is normalised, and ``(normalised, sum)`` returned.
    Statistics are fp32; the result has the dtype of what is normalised.

    Raises:
        InputError: weight or bias is not one value per column, or tensors are on several devices.
    """
    if weight.dim() != 1 or (bias is not None and bias.shape != weight.shape):
        raise InputError("layer_norm needs a weight, and a bias, of one value per column")
    _check("layer_norm", x, weight, bias, residual)
    name = implementation("layer_norm", x.device, backend, call_kind(x, weight))
    if name == "triton":
        from tinylm.kernels.triton import norm as kernels

        refusal = kernels.refusal(x, weight, bias, residual)
        if refusal is None:
            out, total = kernels.norm(x, weight, bias, residual, eps, rms=False)
            return out if residual is None else (out, total)
        name = torch_instead("layer_norm", x.device.type, refusal)
    total = x if residual is None else x + residual
    if name == "reference":
        x_wide = wide(total)
        mean = x_wide.mean(dim=-1, keepdim=True)
        variance = (x_wide - mean).square().mean(dim=-1, keepdim=True)
        out = (x_wide - mean) * torch.rsqrt(variance + eps) * wide(weight)
        out = (out if bias is None else out + wide(bias)).to(total.dtype)
    else:
        out = _torch_layer_norm(total, weight, bias, eps)
    return out if residual is None else (out, total)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, in fp32 on a CPU: there it sums the gradients of bf16 over all rows in bf16.

    After 2,048 rows they were off by 7 %, after 16,384 by 20 % (torch 2.13).
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if x.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias, eps).to(x.dtype)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, residual: None = None, eps: float = 1e-6,
    *, dtype: torch.dtype | None = None, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float = 1e-6,
    *, dtype: torch.dtype | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    With ``residual``, the sum ``x + residual`` is normalised, and ``(normalised, sum)`` returned.
    Statistics are fp32. The weight may have more of the last dimensions of ``x``, such as (H, D)
    for heads that are scaled apart.

    Args:
        dtype: of the result; by default, that of what is normalised.

    Raises:
        InputError: the weight has other dimensions, or tensors are on several devices.
    """
    _check("rms_norm", x, weight, None, residual)
    name = implementation("rms_norm", x.device, backend, call_kind(x, weight))
    if name == "triton" and weight.dim() == 1:
        from tinylm.kernels.triton import norm as kernels

        refusal = kernels.refusal(x, weight, None, residual)
        if refusal is None:
            out, total = kernels.norm(x, weight, None, residual, eps, rms=True)
            out = out if dtype is None else out.to(dtype)
            return out if residual is None else (out, total)
        name = torch_instead("rms_norm", x.device.type, refusal)
    total = x if residual is None else x + residual
    dtype = total.dtype if dtype is None else dtype
    if name == "triton":
        whole = rms_norm(total, torch.ones_like(weight[0]), eps=eps, backend=name)
        out = (whole * weight).to(dtype)
    elif name == "reference":
        x_wide = wide(total)
        scale = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
        out = (x_wide * scale * wide(weight)).to(dtype)
    else:
        compiled = _compiled_rms_norm(total, weight, eps, dtype, backend) if name == "c++" else None
        if compiled is None:
            compiled = _RMSNorm.apply(total, weight, eps).to(dtype)  # type: ignore[no-untyped-call]
        out = compiled
    return out if residual is None else (out, total)


def _compiled_rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str | None
) -> Tensor | None:
    """The C++ kernel's result; None if it refuses."""
    from tinylm.kernels.compiled import norm as compiled

    refusal = compiled.rms_norm_refusal(x, weight, dtype)
    if refusal is None:
        out: Tensor = compiled.rms_norm(x, weight, eps, dtype)[0]
        return out
    torch_instead_of_compiled("rms_norm", x.device.type, refusal, backend)
    return None


def _check(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    if weight.dim() == 0 or weight.shape != x.shape[-weight.dim() :]:
        raise InputError(
            f"{operator} of shape {tuple(x.shape)} with a weight of shape {tuple(weight.shape)}: "
            "they must have the same last dimensions"
        )
    check_devices(operator, x, weight, bias, residual)


def call_kind(x: Tensor, weight: Tensor) -> str:
    """What the time of a norm hangs on, for `tinylm.kernels.dispatch.select`."""
    width = "heads" if weight.dim() > 1 else at_most("C", x.shape[-1], 256, 4096)
    return f"{dtype_name(x.dtype)}, {width}"


class _RMSNorm(torch.autograd.Function):
    """With x̂ = x · r, r = 1 / sqrt(mean(x²) + eps): dx = r (w dy - x̂ mean(w dy x̂)).

    Keeps only x and r. Autograd of the plain formula takes three to five times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_wide = wide(x)
        length = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        out: Tensor = (x_wide * r).mul_(wide(weight)).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        w = wide(weight)
        dy, x_hat = wide(grad_outputs[0]), wide(x) * r
        both = dy * x_hat
        dweight = both.sum_to_size(w.shape)
        mean = both.mul_(w).mean(dim=-1, keepdim=True)
        dx = (dy * w).addcmul_(x_hat, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dweight.to(weight.dtype), None
