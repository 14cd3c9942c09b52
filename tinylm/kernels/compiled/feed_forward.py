"""A feed-forward layer with its norm and residual (``csrc/feed_forward.hpp``)."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import (
    MATRIX_STEP,
    named_kernel,
    products_refusal,
    require,
    rows_of,
)
from tinylm.kernels.dispatch import autocast_dtype, dtype_name


@torch.library.custom_op("tinylm::feed_forward", mutates_args=(), device_types="cpu")
def feed_forward(
    x: Tensor, norm_weight_C: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`tinylm.kernels.feed_forward` of fp32 with products of bf16; and h = (gate, value)."""
    inputs = _feed_forward_inputs(x, norm_weight_C, up_weight, down_weight)
    out, h = _feed_forward_outputs(*inputs[:1], up_weight)
    addresses = [tensor.data_ptr() for tensor in inputs]
    sizes = *rows_of(x), down_weight.shape[1]
    named_kernel("feed_forward")(
        sizes, addresses, eps, out.data_ptr(), h.data_ptr(), torch.get_num_threads()
    )
    return out, h


@feed_forward.register_fake
def _(
    x: Tensor, norm_weight_C: Tensor, up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _feed_forward_outputs(x, up_weight)


def _feed_forward_outputs(x: Tensor, up_weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x.new_empty(*x.shape[:-1], len(up_weight), dtype=torch.bfloat16)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h


@torch.library.custom_op("tinylm::feed_forward_backward", mutates_args=(), device_types="cpu")
def feed_forward_backward(
    x: Tensor,
    norm_weight_C: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    h: Tensor,
    dout: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, and the gradients of the three weights."""
    inputs = _feed_forward_inputs(x, norm_weight_C, up_weight, down_weight)
    own = h.shape == (*x.shape[:-1], len(up_weight)) and h.dtype == torch.bfloat16
    require(own and dout.shape == x.shape, "feed_forward's gradient", x, h, dout)
    h, dout = h.contiguous(), dout.float().contiguous()
    dx, dnorm_weight_C, dup, ddown = (torch.empty_like(tensor) for tensor in inputs)
    addresses = [tensor.data_ptr() for tensor in inputs]
    gradients = [tensor.data_ptr() for tensor in (dup, ddown, dnorm_weight_C)]
    sizes = *rows_of(x), down_weight.shape[1]
    given = sizes, addresses, eps, h.data_ptr(), dout.data_ptr()
    named_kernel("feed_forward_backward")(*given, dx.data_ptr(), gradients, torch.get_num_threads())
    return dx, dnorm_weight_C, dup, ddown


@feed_forward_backward.register_fake
def _(
    x: Tensor, norm_weight_C: Tensor, up_weight: Tensor, down_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    tensors = x, norm_weight_C, up_weight, down_weight
    dx, dnorm_weight_C, dup, ddown = (torch.empty_like(t, memory_format=like) for t in tensors)
    return dx, dnorm_weight_C, dup, ddown


def _feed_forward_inputs(
    x: Tensor, norm_weight_C: Tensor, up_weight: Tensor, down_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, F = down_weight.shape
    own = x.shape[-1:] == norm_weight_C.shape == (C,) and up_weight.shape == (2 * F, C)
    own = own and x.numel() > 0 and F > 0 and C % MATRIX_STEP == F % MATRIX_STEP == 0
    tensors = x, norm_weight_C, up_weight, down_weight
    own = own and all(tensor.dtype == torch.float32 for tensor in tensors)
    require(own, "feed_forward", *tensors)
    return (
        x.contiguous(),
        norm_weight_C.contiguous(),
        up_weight.contiguous(),
        down_weight.contiguous(),
    )


def _feed_forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.eps = inputs[4]
    ctx.mark_non_differentiable(output[1])


def _feed_forward_gradient(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *feed_forward_backward(*ctx.saved_tensors, dout, ctx.eps), None


feed_forward.register_autograd(_feed_forward_gradient, setup_context=_feed_forward_setup)


def feed_forward_refusal(x: Tensor, *weights: Tensor) -> str | None:
    """Why `feed_forward` does not take this call."""
    dtype = autocast_dtype(x)
    if dtype != torch.bfloat16:
        return f"of products in {dtype_name(dtype)}; it takes bf16"
    if not all(tensor.dtype == torch.float32 for tensor in (x, *weights)):
        return "of numbers that are not fp32"
    C, F = weights[-1].shape
    if C % MATRIX_STEP or F % MATRIX_STEP:
        return f"of widths {C} and {F}; it takes multiples of {MATRIX_STEP}"
    return products_refusal() if x.numel() and F else "of nothing"
