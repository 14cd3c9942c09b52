"""What the tests of the operators share: inputs, tolerances, and the implementations in torch."""

import torch
from torch import Tensor

from tinylm.kernels import dispatch

# Largest error relative to the largest value, by dtype of the inputs. One table for all tests.
# fp32: rounding of scores or logits of size s moves their exponentials by s · 1.2e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.6e-2}

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

LENGTHS = [1, 7, 31, 33, 63, 100]

# The Triton kernels have their own tests, in test_triton_kernels.py.
TORCH = {
    operator: [name for name in names if name != "triton"]
    for operator, names in dispatch.IMPLEMENTATIONS.items()
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "", floor: float = 1e-3
) -> None:
    """``floor``: the size of what cancels, where little or nothing is left of it."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp(min=floor)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: error {error:.3g}, scale {scale:.3g}"


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = randn(*out.shape, dtype=out.dtype, seed=99)
    return list(torch.autograd.grad((out * weights).sum(), inputs))
