"""The operators' C++ kernels for CPUs (``csrc/simd/training.hpp``): each makes one pass of several.

They are registered with torch like any others, so autograd, torch.compile and opcheck know them.
Here is checked what C++ only gets as addresses. Variants for AVX-512 with bf16, for AVX2 and for
any processor are chosen when they are called.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylm import _C
from tinylm.errors import InputError
from tinylm.kernels.dispatch import dtype_name

if TYPE_CHECKING:
    from tinylm.kernels.muon import Matrix, MuonOptions

# Both sizes of a matrix that is multiplied whole come in blocks of so many.
MATRIX_STEP = 32

# What is summed over a vector's words of two bf16 comes in vectors of the processor's.
HEAD_DIM_STEP = 32


def refusal(x: Tensor) -> str | None:
    """Why no kernel here takes these numbers; None if one does."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return f"of {dtype_name(x.dtype)} on {x.device.type}; it takes bf16 and fp32 on a CPU"
    return None if x.numel() else "of nothing"


def products_refusal() -> str | None:
    """Why torch multiplies matrices of bf16 faster here; None if it does not."""
    faster: str | None = _C.faster_than_own_products()
    return faster


def require(holds: bool, what: str, *tensors: Tensor) -> None:
    if not holds:
        shapes = ", ".join(f"{tuple(x.shape)} in {dtype_name(x.dtype)}" for x in tensors)
        raise InputError(f"{what} of {shapes}: these do not belong together")


def named_kernel(name: str, x: Tensor | None = None) -> Any:
    return getattr(_C, name if x is None else f"{name}_{dtype_name(x.dtype)}")


# --- cross-entropy -------------------------------------------------------------------------------


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
    return refusal(h_NC.new_empty(1, dtype=dtype))


# --- SwiGLU --------------------------------------------------------------------------------------


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


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many vectors, and how long they are."""
    return x.numel() // max(x.shape[-1], 1), x.shape[-1]


# --- RMS norm ------------------------------------------------------------------------------------


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
    return refusal(x)


# --- RMS norm and rotary -------------------------------------------------------------------------


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


# --- attention -----------------------------------------------------------------------------------


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


# --- Muon ----------------------------------------------------------------------------------------


def muon_refusal(matrices: Sequence["Matrix"], options: "MuonOptions") -> str | None:
    """Why `muon` does not take these matrices."""
    if options.dtype != torch.bfloat16:
        return f"of products in {dtype_name(options.dtype)}; it takes bf16"
    if isinstance(options.lr, Tensor) or options.found_inf is not None:
        return "of steps that are set off without a look"
    for weight, gradient, momentum, stacked in matrices:
        rows, columns = weight.shape
        if rows % (stacked * MATRIX_STEP) or columns % MATRIX_STEP or not weight.numel():
            shape = f"{stacked} matrices of {rows // stacked} x {columns}"
            return f"of {shape}; it takes multiples of {MATRIX_STEP}"
        tensors = weight, gradient, momentum
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
            return "of matrices that are not fp32, row after row"
    return products_refusal()


def muon(
    matrices: Sequence["Matrix"],
    options: "MuonOptions",
    coefficients: tuple[float, float, float],
    iterations: int,
) -> None:
    """`tinylm.kernels.muon_step`, without copies; each matrix by one thread."""
    maps = []
    for *tensors, stacked in matrices:
        rows, columns = tensors[0].shape
        size = rows // stacked
        addresses = [x.data_ptr() for x in tensors]
        for start in range(0, rows, size):
            offset = start * columns * tensors[0].element_size()
            maps.append((*(address + offset for address in addresses), size, columns))
    shared = float(options.lr), options.momentum, options.weight_decay, coefficients, iterations
    named_kernel("muon")(maps, *shared, torch.get_num_threads())
    for weight, _, momentum, _ in matrices:  # as torch counts changes, for autograd to see them
        torch.autograd.graph.increment_version((weight, momentum))
