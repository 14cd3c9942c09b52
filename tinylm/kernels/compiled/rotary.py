"""RMS norm of heads and rotary positions in one pass."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import named_kernel, require


@torch.library.custom_op("tinylm::norm_rotary", mutates_args=(), device_types="cpu")
def norm_rotary(
    x_NHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of each head, turned by the angles of position n % T; and r_NH (fp32)."""
    _require_heads(x_NHD, weight_HD, cos_TD, sin_TD)
    x_NHD = _with_dense_rows(x_NHD)
    out_NHD = torch.empty_like(x_NHD, memory_format=torch.contiguous_format)
    r_NH = x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.float32)
    addresses = x_NHD.data_ptr(), out_NHD.data_ptr(), r_NH.data_ptr()
    weight_HD = weight_HD.float().contiguous()
    cos_TD, sin_TD = _tables(cos_TD, sin_TD)
    angles = cos_TD.data_ptr(), sin_TD.data_ptr(), len(cos_TD)
    shapes = _sizes(x_NHD), weight_HD.data_ptr(), angles, eps
    named_kernel("norm_rotary", x_NHD)(*addresses, *shapes, torch.get_num_threads())
    return out_NHD, r_NH


@norm_rotary.register_fake
def _(
    x_NHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out_NHD = torch.empty_like(x_NHD, memory_format=torch.contiguous_format)
    return out_NHD, x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.float32)


@torch.library.custom_op("tinylm::norm_rotary_backward", mutates_args=(), device_types="cpu")
def norm_rotary_backward(
    x_NHD: Tensor,
    weight_HD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    r_NH: Tensor,
    dout_NHD: Tensor,
) -> tuple[Tensor, Tensor]:
    """dx_NHD, and dweight_HD in fp32."""
    _require_heads(x_NHD, weight_HD, cos_TD, sin_TD)
    own = dout_NHD.shape == x_NHD.shape and dout_NHD.dtype == x_NHD.dtype
    require(own, "norm_rotary's gradient", x_NHD, dout_NHD)
    x_NHD, dout_NHD = _with_dense_rows(x_NHD), dout_NHD.contiguous()
    dx_NHD = torch.empty_like(x_NHD, memory_format=torch.contiguous_format)
    weight_HD = weight_HD.float().contiguous()
    dweight_HD = torch.empty_like(weight_HD)
    tensors = x_NHD, r_NH, dout_NHD, dx_NHD, dweight_HD
    addresses = (tensor.data_ptr() for tensor in tensors)
    cos_TD, sin_TD = _tables(cos_TD, sin_TD)
    angles = cos_TD.data_ptr(), sin_TD.data_ptr(), len(cos_TD)
    shapes = _sizes(x_NHD), weight_HD.data_ptr(), angles
    named_kernel("norm_rotary_backward", x_NHD)(*addresses, *shapes, torch.get_num_threads())
    return dx_NHD, dweight_HD


@norm_rotary_backward.register_fake
def _(
    x_NHD: Tensor,
    weight_HD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    r_NH: Tensor,
    dout_NHD: Tensor,
) -> tuple[Tensor, Tensor]:
    dx_NHD = torch.empty_like(x_NHD, memory_format=torch.contiguous_format)
    return dx_NHD, torch.empty_like(
        weight_HD, dtype=torch.float32, memory_format=torch.contiguous_format
    )


def _norm_rotary_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_rotary_gradient(ctx: Any, dout_NHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_NHD, weight_HD, *saved = ctx.saved_tensors
    dx_NHD, dweight_HD = norm_rotary_backward(x_NHD, weight_HD, *saved, dout_NHD)
    return dx_NHD, dweight_HD.to(weight_HD.dtype), None, None, None


norm_rotary.register_autograd(_norm_rotary_gradient, setup_context=_norm_rotary_setup)


def _require_heads(x_NHD: Tensor, weight_HD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    D = x_NHD.shape[-1]
    tables = cos_TD.shape == sin_TD.shape and cos_TD.shape[1:] == (D,) and len(cos_TD) > 0
    own = x_NHD.dim() == 3 and D % 2 == 0 and weight_HD.shape == x_NHD.shape[1:] and tables
    require(own, "norm_rotary", x_NHD, weight_HD, cos_TD, sin_TD)


def _tables(*tables_TD: Tensor) -> tuple[Tensor, ...]:
    return tuple(table.float().contiguous() for table in tables_TD)


def _with_dense_rows(x_NHD: Tensor) -> Tensor:
    """``x_NHD``, or a copy where the heads of a row are not side by side."""
    return x_NHD if x_NHD[:1].is_contiguous() and x_NHD.stride(0) >= 0 else x_NHD.contiguous()


def _sizes(x_NHD: Tensor) -> tuple[int, int, int, int]:
    return *x_NHD.shape, x_NHD.stride(0)
