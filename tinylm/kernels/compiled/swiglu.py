"""SwiGLU."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import named_kernel, require, rows_of


@torch.library.custom_op("tinylm::swiglu", mutates_args=(), device_types="cpu")
def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) · value`` of x = (gate, value) along the last dimension (Shazeer 2020)."""
    require(x.shape[-1] % 2 == 0, "swiglu", x)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    named_kernel("swiglu", x)(x.data_ptr(), out.data_ptr(), *rows_of(out), torch.get_num_threads())
    return out


@swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("tinylm::swiglu_backward", mutates_args=(), device_types="cpu")
def swiglu_backward(x: Tensor, dout: Tensor) -> Tensor:
    own = x.dtype == dout.dtype and x.shape == (*dout.shape[:-1], 2 * dout.shape[-1])
    require(own, "swiglu's gradient", x, dout)
    x, dout = x.contiguous(), dout.contiguous()
    dx = torch.empty_like(x)
    addresses = x.data_ptr(), dout.data_ptr(), dx.data_ptr()
    named_kernel("swiglu_backward", x)(*addresses, *rows_of(dout), torch.get_num_threads())
    return dx


@swiglu_backward.register_fake
def _(x: Tensor, dout: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _swiglu_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, dout: Tensor) -> Tensor:
    dx: Tensor = swiglu_backward(ctx.saved_tensors[0], dout)
    return dx


swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)
