"""A gated feed-forward layer (Shazeer 2020) with the norm before it and the residual around it."""

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
from tinylm.kernels.swiglu import swiglu


def feed_forward(
    x: Tensor,
    norm_weight_C: Tensor,
    up_weight: Tensor,
    down_weight_CF: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """``x + down · swiglu(up · rms_norm(x))``, in the dtype of x.

    Under autocast, products are in its dtype.

    Args:
        x: (…, C).
        up_weight: (2 F, C), the gates' rows first.
        backend: ``"c++"`` or ``"separate"``; chosen by device if None.

    Raises:
        InputError: shapes do not belong together, or tensors are on several devices.
    """
    C, width = x.shape[-1], down_weight_CF.shape[1]
    shapes = norm_weight_C.shape, up_weight.shape, down_weight_CF.shape
    if shapes != ((C,), (2 * width, C), (C, width)):
        shown = ", ".join(str(tuple(shape)) for shape in shapes)
        raise InputError(
            f"feed_forward of shape {tuple(x.shape)} with weights of shapes {shown}: "
            f"they must be (C,), (2 F, C) and (C, F)"
        )
    check_devices("feed_forward", x, norm_weight_C, up_weight, down_weight_CF)
    if implementation("feed_forward", x.device, backend) == "c++":
        from tinylm.kernels.compiled import feed_forward as compiled

        weights = norm_weight_C, up_weight, down_weight_CF
        refusal = compiled.feed_forward_refusal(x, *weights)
        if refusal is None:
            out: Tensor = compiled.feed_forward(x, *weights, eps)[0]
            return out
        torch_instead_of_compiled("feed_forward", x.device.type, refusal, backend)
    normed = rms_norm(x, norm_weight_C, eps=eps, dtype=autocast_dtype(x))
    layer = F.linear(swiglu(F.linear(normed, up_weight)), down_weight_CF)
    return x + layer.to(x.dtype)
