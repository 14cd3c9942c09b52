"""The norms as Triton kernels against fp64 references: outputs, gradients, odd shapes, repeats."""

import pytest
import torch
from triton_inputs import (
    DTYPE,
    DTYPES,
    LENGTHS,
    WARNINGS,
    among_nan,
    assert_close,
    assert_same_gradients,
    fp64,
    poisoned_and_never_falling_back,  # noqa: F401  # a fixture, which pytest uses
    randn,
)

from tinylm import kernels

pytestmark = WARNINGS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [*((n, 128) for n in LENGTHS), (33, 1), (100, 31)])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(rms: bool, residual: bool, width: int, rows: int, dtype: torch.dtype) -> None:
    x, other = (among_nan(randn(rows, width, dtype=dtype, seed=i)) for i in range(2))
    # Master weights in fp32.
    weight, bias = (among_nan(randn(width, dtype=torch.float32, seed=i)) for i in (2, 3))
    options = {"residual": other} if residual else {}
    # The kernel normalises the sum as it is stored; so must the reference.
    total = (x + other).detach() if residual else x
    inputs64 = fp64(total, weight, *([] if rms else [bias]))
    if rms:
        result = kernels.rms_norm(x, weight, backend="triton", **options)
        expected = kernels.rms_norm(*inputs64)
    else:
        result = kernels.layer_norm(x, weight, bias, backend="triton", **options)
        expected = kernels.layer_norm(*inputs64, backend="reference")
    out, summed = result if residual else (result, x)
    assert torch.equal(summed, total)
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    inputs = [x, weight] + ([] if rms else [bias])
    both, both64 = out, expected
    if residual:  # a gradient arrives through the sum too
        both, both64 = torch.stack((out, summed)), torch.stack((expected, inputs64[0]))
    if width == 1 and not rms:
        return  # the gradient is 0 and only rounding is left
    weights = randn(*both.shape, seed=99).to(dtype)
    actual = torch.autograd.grad(both, inputs, weights, retain_graph=True)
    again = torch.autograd.grad(both, inputs, weights, retain_graph=True)
    wanted = torch.autograd.grad(both64, inputs64, weights.double())
    for i, (a, b, w) in enumerate(zip(actual, again, wanted, strict=True)):
        assert torch.equal(a, b)
        assert_close(a, w, dtype, f"gradient {i}")
    if residual:
        assert torch.equal(torch.autograd.grad(both, [other], weights)[0], actual[0])


def test_norm_of_head_vectors_and_of_one_row() -> None:
    """What QK-norm passes (a transposed view), and a single vector."""
    x = randn(2, 5, 6, 16)[:, :, 1:3].transpose(1, 2).requires_grad_()
    weight = randn(16, seed=1).requires_grad_()
    inputs64 = fp64(x, weight)
    out = kernels.rms_norm(x, weight, backend="triton")
    expected = kernels.rms_norm(*inputs64)
    assert_close(out, expected, DTYPE, "out")
    assert_same_gradients(out, [x, weight], expected, inputs64)
    one = kernels.rms_norm(x[0, 0, 0], weight, backend="triton")
    assert_close(one, expected[0, 0, 0], DTYPE, "one row")


def test_norm_of_heads_scaled_apart() -> None:
    """What QK-norm passes for queries and keys together."""
    x = randn(2, 5, 6, 16)[:, :, 1:4].requires_grad_()
    weight = randn(3, 16, seed=1).requires_grad_()
    inputs64 = fp64(x, weight)
    out = kernels.rms_norm(x, weight, backend="triton")
    expected = kernels.rms_norm(*inputs64)
    assert_close(out, expected, DTYPE, "out")
    assert_same_gradients(out, [x, weight], expected, inputs64)


def test_norm_of_mixed_dtypes() -> None:
    x, other = randn(9, 32, dtype=torch.float16), randn(9, 32, dtype=torch.float32, seed=1)
    weight = randn(32, seed=2)
    out, total = kernels.rms_norm(x, weight, residual=other, backend="triton")
    assert out.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + other)
    assert_close(out, kernels.rms_norm(total.double(), weight.double()), torch.float32, "out")


def test_norms_of_inputs_with_any_strides() -> None:
    weight = randn(1, seed=1).expand(32).detach().requires_grad_()
    views = randn(1, 32).expand(9, 32), randn(9, 1).expand(9, 32), randn(32, 9).T
    for x, residual in zip(views, (None, views[2], views[0]), strict=True):
        inputs = [x.detach().requires_grad_(), weight]
        result = kernels.rms_norm(*inputs, residual=residual, backend="triton")
        out = result if residual is None else result[0]
        inputs64 = fp64(*inputs)
        total = inputs64[0] if residual is None else inputs64[0] + residual
        expected = kernels.rms_norm(total, inputs64[1])
        assert_close(out, expected, DTYPE, "out")
        assert_same_gradients(out, inputs, expected, inputs64)
