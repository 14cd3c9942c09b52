"""What stands before and after attention: a norm and a projection of what it gives, and a
projection with the residual around both."""

import torch.nn.functional as F
from torch import Tensor

from tinylm.errors import InputError
from tinylm.kernels.dispatch import (
    autocast_dtype,
    check_devices,
    implementation,
    torch_instead_of_compiled,
)
from tinylm.kernels.norm import rms_norm


def norm_linear(
    x: Tensor,
    norm_weight_C: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """``weight · rms_norm(x)``, in the dtype of x, or under autocast in its dtype.

    Args:
        x: (…, C).
        weight: (outputs, C).
        backend: ``"c++"`` or ``"separate"``; chosen by device if None.

    Raises:
        InputError: shapes do not belong together, or tensors are on several devices.
    """
    if norm_weight_C.shape != x.shape[-1:] or weight.shape[1:] != x.shape[-1:]:
        shown = f"{tuple(norm_weight_C.shape)}, {tuple(weight.shape)}"
        raise InputError(
            f"norm_linear of shape {tuple(x.shape)} with weights of shapes {shown}: "
            f"they must be (C,) and (outputs, C)"
        )
    check_devices("norm_linear", x, norm_weight_C, weight)
    if implementation("norm_linear", x.device, backend) == "c++":
        from tinylm.kernels.compiled import projections as compiled

        refusal = compiled.norm_linear_refusal(x, norm_weight_C, weight)
        if refusal is None:
            out: Tensor = compiled.norm_linear(x, norm_weight_C, weight, eps)
            return out
        torch_instead_of_compiled("norm_linear", x.device.type, refusal, backend)
    return F.linear(rms_norm(x, norm_weight_C, eps=eps, dtype=autocast_dtype(x)), weight)


def linear_residual(x: Tensor, a: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """``x + weight · a``, in the dtype of x.

    Under autocast, the product is in its dtype.

    Args:
        x: (…, C).
        a: (…, inputs).
        weight: (C, inputs).
        backend: ``"c++"`` or ``"separate"``; chosen by device if None.

    Raises:
        InputError: shapes do not belong together, or tensors are on several devices.
    """
    if x.shape[:-1] != a.shape[:-1] or weight.shape != (*x.shape[-1:], *a.shape[-1:]):
        shown = f"{tuple(a.shape)} and a weight of shape {tuple(weight.shape)}"
        raise InputError(
            f"linear_residual of shapes {tuple(x.shape)} and {shown}: "
            f"they must be (…, C), (…, inputs) and (C, inputs)"
        )
    check_devices("linear_residual", x, a, weight)
    if implementation("linear_residual", x.device, backend) == "c++":
        from tinylm.kernels.compiled import projections as compiled

        refusal = compiled.linear_residual_refusal(x, a, weight)
        if refusal is None:
            out: Tensor = compiled.linear_residual(x, a, weight)
            return out
        torch_instead_of_compiled("linear_residual", x.device.type, refusal, backend)
    return x + F.linear(a, weight).to(x.dtype)
