"""RMS norm."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import named_kernel, numbers_refusal, require, rows_of
from tinylm.kernels.dispatch import dtype_name


@torch.library.custom_op("tinylm::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, in ``dtype``; and r of each row, in fp32."""
    require(weight_C.shape == x.shape[-1:], "rms_norm", x, weight_C)
    x, weight_C = x.contiguous(), weight_C.float().contiguous()
    out, r = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    addresses = x.data_ptr(), out.data_ptr(), r.data_ptr()
    run = named_kernel(f"rms_norm_{dtype_name(x.dtype)}", out)
    run(*addresses, *rows_of(x), weight_C.data_ptr(), eps, torch.get_num_threads())
    return out, r


@rms_norm.register_fake
def _(x: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("tinylm::rms_norm_backward", mutates_args=(), device_types="cpu")
def rms_norm_backward(
    x: Tensor, weight_C: Tensor, r: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, and dweight_C in fp32."""
    own = dout.shape == x.shape and r.shape == x.shape[:-1] and weight_C.shape == x.shape[-1:]
    require(own, "rms_norm's gradient", x, dout, weight_C)
    x, dout, weight_C = x.contiguous(), dout.contiguous(), weight_C.float().contiguous()
    dx, dweight_C = torch.empty_like(x), torch.empty_like(weight_C)
    addresses = (tensor.data_ptr() for tensor in (x, r, dout, dx, dweight_C))
    run = named_kernel(f"rms_norm_backward_{dtype_name(x.dtype)}", dout)
    run(*addresses, *rows_of(x), weight_C.data_ptr(), torch.get_num_threads())
    return dx, dweight_C


@rms_norm_backward.register_fake
def _(x: Tensor, weight_C: Tensor, r: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight_C.new_empty(weight_C.shape, dtype=torch.float32)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight_C = rms_norm_backward(*ctx.saved_tensors, dout)
    return dx, dweight_C.to(ctx.saved_tensors[1].dtype), None, None


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_setup)


def rms_norm_refusal(x: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why `rms_norm` does not take this call."""
    if weight.dim() > 1:
        return "of heads that are scaled apart"
    if dtype not in (x.dtype, torch.bfloat16):
        return f"from {dtype_name(x.dtype)} to {dtype_name(dtype)}"
    return numbers_refusal(x)
