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
    _step_in_torch(matrices, options)


def _step_in_torch(matrices: Sequence[Matrix], options: MuonOptions) -> None:
    """In as few operations as there can be: on a GPU, small ones cost what large ones do."""
    lr = options.lr if options.found_inf is None else options.lr * (1 - options.found_inf)
    weights = [matrix.weight for matrix in matrices]
    if options.weight_decay:
        torch._foreach_mul_(weights, 1 - lr * options.weight_decay)
    maps_KMN = [
        ahead.reshape(matrix.stacked, -1, ahead.shape[1])
        for matrix, ahead in zip(matrices, _ahead(matrices, options), strict=True)
    ]
    sizes = [math.sqrt(max(1.0, maps.shape[1] / maps.shape[2])) for maps in maps_KMN]
    updates = [
        update.view(weight.shape)
        for update, weight in zip(_orthogonalised(maps_KMN, options.dtype), weights, strict=True)
    ]
    torch._foreach_mul_(updates, sizes)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(weights, updates)


def _orthogonalised(maps_KMN: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalise` of each, as one batch those that have the same shape or its transpose."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, maps in enumerate(maps_KMN):
        alike.setdefault(tuple(sorted(maps.shape[1:])), []).append(i)
    out = list(maps_KMN)
    for indices in alike.values():
        tall = [maps_KMN[i].shape[1] > maps_KMN[i].shape[2] for i in indices]
        turned = [maps_KMN[i].mT if t else maps_KMN[i] for i, t in zip(indices, tall, strict=True)]
        together = orthogonalise(torch.cat(turned), dtype)
        parts = torch.split(together, [len(maps) for maps in turned])
        for i, t, part in zip(indices, tall, parts, strict=True):
            out[i] = part.mT.contiguous() if t else part
    return out


def _ahead(matrices: Sequence[Matrix], options: MuonOptions) -> list[Tensor]:
    """The gradients with Nesterov momentum."""
    momenta = [matrix.momentum for matrix in matrices]
    gradients = [matrix.gradient for matrix in matrices]
    if options.found_inf is not None:  # then a momentum draws near to itself, and stays
        all_m, all_g = (torch.cat([x.flatten() for x in xs]) for xs in (momenta, gradients))
        chosen = torch.where(options.found_inf > 0, all_m, all_g)
        parts = torch.split(chosen, [m.numel() for m in momenta])
        gradients = [part.view(m.shape) for part, m in zip(parts, momenta, strict=True)]
    torch._foreach_lerp_(momenta, gradients, 1 - options.momentum)
    return list(torch._foreach_lerp(gradients, momenta, options.momentum))
