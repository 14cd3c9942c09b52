"""A step of Muon (Jordan et al. 2024): momentum, orthogonalised; see `tinylm.optim.Muon`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.kernels.dispatch import implementation, torch_instead_of_compiled

# The quintic of Jordan et al. 2024: its slope at zero is steep, so five steps suffice; it does
# not converge to exactly one but into about 0.7 … 1.2, which trains as well.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Matrix(NamedTuple):
    """A weight matrix, its gradient and momentum, and how many equal maps its rows stack."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    stacked: int = 1


class MuonOptions(NamedTuple):
    """See `tinylm.optim.Muon`."""

    lr: float | Tensor
    momentum: float = 0.95
    weight_decay: float = 0.0
    dtype: torch.dtype = torch.float32
    found_inf: Tensor | None = None


def orthogonalise(g_KMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For each of K matrices ``U S Vᵀ`` roughly ``U Vᵀ``, by Newton–Schulz iteration.

    Products run in ``dtype``; those of fp64 matrices in fp64.
    """
    a, b, c = NEWTON_SCHULZ
    dtype = torch.promote_types(dtype, g_KMN.dtype) if g_KMN.dtype == torch.float64 else dtype
    tall = g_KMN.shape[-2] > g_KMN.shape[-1]
    x = g_KMN.mT if tall else g_KMN
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).contiguous()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g_KMN.dtype)


@torch.no_grad()
def muon_step(
    matrices: Sequence[Matrix], options: MuonOptions, *, backend: str | None = None
) -> None:
    """Changes weights and momenta of all matrices in place.

    Args:
        backend: ``"c++"`` or ``"torch"``; chosen by device if None.
    """
    if not matrices:
        return
    device = matrices[0].weight.device
    if implementation("muon", device, backend) == "c++":
        from tinylm.kernels.compiled import muon as compiled

        refusal = compiled.muon_refusal(matrices, options)
        if refusal is None:
            compiled.muon(matrices, options, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS)
            return
        torch_instead_of_compiled("muon", device.type, refusal, backend)
    alike: dict[tuple[torch.Size, int], list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.weight.shape, matrix.stacked), []).append(matrix)
    for equal in alike.values():
        _step_together(equal, options)


def _step_together(matrices: list[Matrix], options: MuonOptions) -> None:
    """A step of matrices of equal shape, which are orthogonalised together."""
    weights, stacked = [matrix.weight for matrix in matrices], matrices[0].stacked
    shape, lr = weights[0].shape, options.lr
    if options.found_inf is not None:
        lr = lr * (1 - options.found_inf)
    ahead = _ahead(matrices, options)
    g_KMN = torch.stack(ahead).view(len(ahead) * stacked, -1, shape[1])
    updates = orthogonalise(g_KMN, options.dtype).reshape(-1, *shape)
    if options.weight_decay:
        torch._foreach_mul_(weights, 1 - lr * options.weight_decay)
    size = lr * math.sqrt(max(1.0, g_KMN.shape[1] / shape[1]))
    if isinstance(size, Tensor):
        torch._foreach_sub_(weights, (updates * size).unbind())
    else:
        torch._foreach_add_(weights, updates.unbind(), alpha=-size)


def _ahead(matrices: list[Matrix], options: MuonOptions) -> list[Tensor]:
    """The gradients with Nesterov momentum."""
    momenta = [matrix.momentum for matrix in matrices]
    gradients = [matrix.gradient for matrix in matrices]
    if options.found_inf is not None:  # then a momentum draws near to itself, and stays
        bad = options.found_inf > 0
        pairs = zip(momenta, gradients, strict=True)
        gradients = [torch.where(bad, m, g) for m, g in pairs]
    torch._foreach_lerp_(momenta, gradients, 1 - options.momentum)
    return list(torch._foreach_lerp(gradients, momenta, options.momentum))
