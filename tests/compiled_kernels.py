"""What the tests of the C++ kernels share."""

from collections.abc import Callable
from typing import Any

import torch
from operators import assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.kernels.muon import Matrix

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 31, 33, 63, 100]
INFINITY = float("inf")


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def check(run: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Outputs and gradients of ``run`` are those of ``reference`` in float64."""
    dtype = inputs[0].dtype
    inputs64 = wide(*inputs)
    out, expected = run(*inputs), reference(*inputs64)
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs64), strict=True)
    for i, (actual, wanted) in enumerate(pairs):
        assert_close(actual, wanted, dtype, f"gradient {i}", floor=1.0)


def attention(*qkv: Tensor, **options: Any) -> Tensor:
    return kernels.causal_attention(*qkv, backend="c++", **options)


def heads(*shape: int) -> list[Tensor]:
    return [randn(*shape, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3)]


def muon_matrices(
    sizes: list[tuple[int, int, int]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Matrix]:
    """Of (rows, columns, stacked), with gradients of some rank and size."""
    matrices = []
    for i, (rows, columns, stacked) in enumerate(sizes):
        weight, momentum = (randn(rows, columns, seed=seed + 2 * i + j) for j in range(2))
        gradient = randn(rows, columns, seed=seed + 100 + i) * 0.01 + 0.02
        tensors = (x.float().to(dtype) for x in (weight, gradient, 0.01 * momentum))
        matrices.append(Matrix(*tensors, stacked))
    return matrices


def layer_inputs(rows: tuple[int, ...], C: int, F: int) -> list[Tensor]:
    """x, and weights of a norm and two matrices; these exact in bf16."""
    x, norm = randn(*rows, C, dtype=torch.float32), randn(C, dtype=torch.float32, seed=1)
    up = randn(2 * F, C, dtype=torch.bfloat16, seed=2) / C**0.5
    down = randn(C, F, dtype=torch.bfloat16, seed=3) / F**0.5
    return [t.float().requires_grad_() for t in (x, norm, up, down)]
