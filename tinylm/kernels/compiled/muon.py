"""A step of Muon, each matrix in cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylm.kernels.compiled.common import MATRIX_STEP, named_kernel, products_refusal
from tinylm.kernels.dispatch import dtype_name

if TYPE_CHECKING:
    from tinylm.kernels.muon import Matrix, MuonOptions


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
