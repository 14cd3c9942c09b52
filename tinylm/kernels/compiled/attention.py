"""Causal attention, scores in cache."""

from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import HEAD_DIM_STEP, named_kernel, require
from tinylm.kernels.dispatch import dtype_name


@torch.library.custom_op("tinylm::causal_heads", mutates_args=(), device_types="cpu")
def causal_heads(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention in bf16 of as many queries as keys, and lse_BHT, in fp32."""
    _require_alike(q_BHTD, k_BHTD, v_BHTD)
    q_BHTD, k_BHTD, v_BHTD = map(_with_dense_vectors, (q_BHTD, k_BHTD, v_BHTD))
    out_BHTD = _like_projections(q_BHTD)
    lse_BHT = q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)
    vectors = map(_vectors, (q_BHTD, k_BHTD, v_BHTD, out_BHTD))
    threads = torch.get_num_threads()
    named_kernel("attention")(q_BHTD.shape, scale, *vectors, lse_BHT.data_ptr(), threads)
    return out_BHTD, lse_BHT


@causal_heads.register_fake
def _(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like_projections(q_BHTD), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)


@torch.library.custom_op("tinylm::causal_heads_backward", mutates_args=(), device_types="cpu")
def causal_heads_backward(
    dout_BHTD: Tensor, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = q_BHTD, k_BHTD, v_BHTD, dout_BHTD
    _require_alike(*inputs)
    q_BHTD, k_BHTD, v_BHTD, dout_BHTD = map(_with_dense_vectors, inputs)
    gradients = _gradients(q_BHTD, k_BHTD, v_BHTD)
    named_kernel("attention_backward")(
        q_BHTD.shape, scale, *map(_vectors, (q_BHTD, k_BHTD, v_BHTD)), lse_BHT.data_ptr(),
        *map(_vectors, (dout_BHTD, *gradients)), torch.get_num_threads(),
    )  # fmt: skip
    return gradients


@causal_heads_backward.register_fake
def _(
    dout_BHTD: Tensor, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q_BHTD, k_BHTD, v_BHTD)


def _causal_heads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[3]


def _causal_heads_gradient(ctx: Any, dout_BHTD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *causal_heads_backward(dout_BHTD, *ctx.saved_tensors, ctx.scale), None


causal_heads.register_autograd(_causal_heads_gradient, setup_context=_causal_heads_setup)


def attention_refusal(q_BHTD: Tensor, k_BHSD: Tensor, only_causal: bool) -> str | None:
    """Why `causal_heads` does not take this call; ``only_causal``: nothing else masks it."""
    (T, D), S = q_BHTD.shape[2:], k_BHSD.shape[2]
    if q_BHTD.numel() == 0:
        return "of nothing"
    if not only_causal:
        return "of another mask; it takes the causal one"
    if q_BHTD.device.type != "cpu" or q_BHTD.dtype != torch.bfloat16:
        name = dtype_name(q_BHTD.dtype)
        return f"of {name} on {q_BHTD.device.type}; it takes bf16 on a CPU"
    if S != T:
        return f"{T} queries on {S} keys; it takes as many of both"
    if D == 0 or D % HEAD_DIM_STEP:
        return f"head dimension {D} is no multiple of {HEAD_DIM_STEP}"
    return None


def _require_alike(*tensors_BHTD: Tensor) -> None:
    first = tensors_BHTD[0]
    own = (
        first.dim() == 4
        and first.shape[3] % HEAD_DIM_STEP == 0
        and all(x.shape == first.shape and x.dtype == torch.bfloat16 for x in tensors_BHTD)
    )
    require(own, "attention", *tensors_BHTD)


def _with_dense_vectors(x_BHTD: Tensor) -> Tensor:
    return x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()


def _like_projections(x_BHTD: Tensor) -> Tensor:
    """Empty, in the order of memory of (B, T, H, D), in which projections come and go."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty(B, T, H, D).transpose(1, 2)


def _gradients(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like_projections(q_BHTD), _like_projections(k_BHTD), _like_projections(v_BHTD)


def _vectors(x_BHTD: Tensor) -> tuple[int, ...]:
    return x_BHTD.data_ptr(), *x_BHTD.stride()[:3]
