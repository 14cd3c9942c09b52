"""A head with its cross-entropy, and the passes over logits."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import (
    MATRIX_STEP,
    named_kernel,
    numbers_refusal,
    products_refusal,
    require,
)
from tinylm.kernels.dispatch import dtype_name


@torch.library.custom_op("tinylm::exponentials_", mutates_args=("x_RV",), device_types="cpu")
def exponentials_(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """In place ``exp(x - top)``; top_R and sum_R, fp32, of the exponentials before rounding."""
    require(x_RV.dim() == 2 and x_RV.is_contiguous(), "exponentials", x_RV)
    top_R, sum_R = (x_RV.new_empty(len(x_RV), dtype=torch.float32) for _ in range(2))
    addresses = x_RV.data_ptr(), *x_RV.shape, top_R.data_ptr(), sum_R.data_ptr()
    named_kernel("exponentials", x_RV)(*addresses, torch.get_num_threads())
    return top_R, sum_R


@exponentials_.register_fake
def _(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    top_R, sum_R = (x_RV.new_empty(len(x_RV), dtype=torch.float32) for _ in range(2))
    return top_R, sum_R


@torch.library.custom_op("tinylm::head_cross_entropy", mutates_args=(), device_types="cpu")
def head_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    row_weights_N: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The cross-entropy of bf16 rows, and its gradients, without logits in memory.

    Returns:
        loss_N; dh_NC, dweight_VC and dbias_V of the sum of losses by ``row_weights_N``; and whether
        they are right: not where sums of exponentials of logits leave 1e-20 … 1e20. All fp32.

    Raises:
        IndexError: a target is neither ``ignore_index`` nor a token.
    """
    (N, C), V = h_NC.shape, len(weight_VC)
    own = C % MATRIX_STEP == 0 and weight_VC.shape == (V, C) and V > 0
    own = own and h_NC.dtype == torch.bfloat16 and targets_N.shape == (N,)
    own = own and (bias_V is None or bias_V.shape == (V,))
    own = own and (row_weights_N is None or row_weights_N.shape == (N,))
    require(own and targets_N.dtype == torch.int64, "cross-entropy", h_NC, weight_VC, targets_N)
    loss_N, *gradients, right = _head_outputs(h_NC, weight_VC, bias_V)
    inputs = [None if x is None else x.float().contiguous() for x in (weight_VC, bias_V)]
    weights = None if row_weights_N is None else row_weights_N.float().contiguous()
    h_NC, targets_N = h_NC.contiguous(), targets_N.contiguous()
    before = (h_NC, *inputs, targets_N, weights)
    right.fill_(
        named_kernel("head_cross_entropy")(
            (N, C, V), *map(_address, before), ignore_index, z_loss,
            *map(_address, (loss_N, *gradients)), torch.get_num_threads(),
        )
    )  # fmt: skip
    dh_NC, dweight_VC, dbias_V = gradients
    return loss_N, dh_NC, dweight_VC, dbias_V, right


@head_cross_entropy.register_fake
def _head_cross_entropy_fake(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _head_outputs(h_NC, weight_VC, bias_V)


def _head_outputs(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, C), V = h_NC.shape, len(weight_VC)
    dbias_V = h_NC.new_empty(0 if bias_V is None else V, dtype=torch.float32)
    loss_N, dh_NC, dweight_VC = (
        h_NC.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, C), (V, C))
    )
    return loss_N, dh_NC, dweight_VC, dbias_V, h_NC.new_empty((), dtype=torch.bool)


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def head_refusal(h_NC: Tensor, dtype: torch.dtype) -> str | None:
    """Why `head_cross_entropy` does not take products in ``dtype``."""
    C = h_NC.shape[1]
    if dtype != torch.bfloat16:
        return f"of products in {dtype_name(dtype)}; it takes bf16"
    if C == 0 or C % MATRIX_STEP:
        return f"of width {C}, which is no multiple of {MATRIX_STEP}"
    return "of nothing" if h_NC.numel() == 0 else products_refusal()


def cross_entropy_refusal(h_NC: Tensor, dtype: torch.dtype, softcap: float | None) -> str | None:
    """Why the logits of a cross-entropy, of products in ``dtype``, do not go through here."""
    if softcap is not None:
        return "of a softcap"
    if torch.compiler.is_compiling():  # inductor's loss was wrong with it; why is not known
        return "within torch.compile"
    return numbers_refusal(h_NC.new_empty(1, dtype=dtype))
