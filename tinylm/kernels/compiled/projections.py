"""What stands before and after attention (``csrc/projections.hpp``)."""

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

# --- norm and projection -------------------------------------------------------------------------


@torch.library.custom_op("tinylm::norm_linear", mutates_args=(), device_types="cpu")
def norm_linear(x: Tensor, norm_weight_C: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`tinylm.kernels.norm_linear` of fp32, in bf16."""
    inputs = _norm_linear_inputs(x, norm_weight_C, weight)
    y = _projected(x, weight)
    sizes, addresses = (*rows_of(x), len(weight)), [tensor.data_ptr() for tensor in inputs]
    named_kernel("norm_linear")(sizes, addresses, eps, y.data_ptr(), torch.get_num_threads())
    return y


@norm_linear.register_fake
def _(x: Tensor, norm_weight_C: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _projected(x, weight)


def _projected(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.bfloat16)


@torch.library.custom_op("tinylm::norm_linear_backward", mutates_args=(), device_types="cpu")
def norm_linear_backward(
    x: Tensor, norm_weight_C: Tensor, weight: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients of the two weights."""
    inputs = _norm_linear_inputs(x, norm_weight_C, weight)
    own = dy.shape == (*x.shape[:-1], len(weight)) and dy.dtype == torch.bfloat16
    require(own, "norm_linear's gradient", x, weight, dy)
    dy = dy.contiguous()
    dx, dnorm_weight_C, dweight = (torch.empty_like(tensor) for tensor in inputs)
    sizes, addresses = (*rows_of(x), len(weight)), [tensor.data_ptr() for tensor in inputs]
    outputs = (tensor.data_ptr() for tensor in (dx, dweight, dnorm_weight_C))
    run = named_kernel("norm_linear_backward")
    run(sizes, addresses, eps, dy.data_ptr(), *outputs, torch.get_num_threads())
    return dx, dnorm_weight_C, dweight


@norm_linear_backward.register_fake
def _(x: Tensor, norm_weight_C: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dnorm_weight_C, dweight = (_dense_like(t) for t in (x, norm_weight_C, weight))
    return dx, dnorm_weight_C, dweight


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _norm_linear_inputs(
    x: Tensor, norm_weight_C: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    own = weight.dim() == 2 and x.shape[-1:] == norm_weight_C.shape == weight.shape[1:]
    own = own and x.numel() > 0 and len(weight) > 0 and _in_steps(weight)
    tensors = x, norm_weight_C, weight
    own = own and all(tensor.dtype == torch.float32 for tensor in tensors)
    require(own, "norm_linear", *tensors)
    return x.contiguous(), norm_weight_C.contiguous(), weight.contiguous()


def _in_steps(weight: Tensor) -> bool:
    return all(size % MATRIX_STEP == 0 for size in weight.shape)


def _norm_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _norm_linear_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *norm_linear_backward(*ctx.saved_tensors, dy, ctx.eps), None


norm_linear.register_autograd(_norm_linear_gradient, setup_context=_norm_linear_setup)


def norm_linear_refusal(x: Tensor, *weights: Tensor) -> str | None:
    """Why `norm_linear` does not take this call."""
    return _refusal(x, weights[-1], (x, *weights))


# --- projection and residual ---------------------------------------------------------------------


@torch.library.custom_op("tinylm::linear_residual", mutates_args=(), device_types="cpu")
def linear_residual(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """`tinylm.kernels.linear_residual` of fp32 and, for ``a``, bf16."""
    a, weight = _linear_residual_inputs(x, a, weight)
    x, out = x.contiguous(), _dense_like(x)
    addresses = (tensor.data_ptr() for tensor in (a, weight, x, out))
    sizes = *rows_of(a), len(weight)
    named_kernel("linear_residual")(sizes, *addresses, torch.get_num_threads())
    return out


@linear_residual.register_fake
def _(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    return _dense_like(x)


@torch.library.custom_op("tinylm::linear_residual_backward", mutates_args=(), device_types="cpu")
def linear_residual_backward(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """da and dweight; dx is dout."""
    a, weight = _linear_residual_inputs(dout, a, weight)
    dout, da, dweight = dout.contiguous(), torch.empty_like(a), torch.empty_like(weight)
    addresses = (tensor.data_ptr() for tensor in (a, weight, dout, da, dweight))
    sizes = *rows_of(a), len(weight)
    named_kernel("linear_residual_backward")(sizes, *addresses, torch.get_num_threads())
    return da, dweight


@linear_residual_backward.register_fake
def _(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _dense_like(a), _dense_like(weight)


def _linear_residual_inputs(x: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    own = weight.dim() == 2 and weight.shape == (*x.shape[-1:], *a.shape[-1:])
    own = own and x.shape[:-1] == a.shape[:-1] and x.numel() > 0 and a.numel() > 0
    own = own and _in_steps(weight) and a.dtype == torch.bfloat16
    own = own and x.dtype == weight.dtype == torch.float32
    require(own, "linear_residual", x, a, weight)
    return a.contiguous(), weight.contiguous()


def _linear_residual_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _linear_residual_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return dout, *linear_residual_backward(dout, *ctx.saved_tensors)


linear_residual.register_autograd(_linear_residual_gradient, setup_context=_linear_residual_setup)


def linear_residual_refusal(x: Tensor, a: Tensor, weight: Tensor) -> str | None:
    """Why `linear_residual` does not take this call."""
    if a.dtype != torch.bfloat16:
        return f"of {dtype_name(a.dtype)}; it takes bf16"
    return _refusal(x, weight, (x, weight))


def _refusal(x: Tensor, weight: Tensor, wide: tuple[Tensor, ...]) -> str | None:
    dtype = autocast_dtype(x)
    if dtype != torch.bfloat16:
        return f"of products in {dtype_name(dtype)}; it takes bf16"
    if not all(tensor.dtype == torch.float32 for tensor in wide):
        return "of numbers that are not fp32"
    if not _in_steps(weight):
        rows, columns = weight.shape
        return f"of widths {columns} and {rows}; it takes multiples of {MATRIX_STEP}"
    return products_refusal() if x.numel() and weight.numel() else "of nothing"
