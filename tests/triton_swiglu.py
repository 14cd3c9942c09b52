"""SwiGLU as a Triton kernel against fp64: odd shapes, strides, large numbers, repeats."""

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
@pytest.mark.parametrize(
    ("rows", "width"), [*((n, 48) for n in LENGTHS), (33, 1), (9, 31), (5, 600)]
)
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = among_nan(randn(rows, 2 * width, dtype=dtype))
    (x64,) = fp64(x)
    out = kernels.swiglu(x, backend="triton")
    wanted = kernels.swiglu(x64)
    assert out.dtype == dtype
    assert_close(out, wanted, dtype, "out")
    assert_same_gradients(out, [x], wanted, [x64])


def test_strides_of_any_kind() -> None:
    views = randn(2, 7, 32), randn(7, 2, 32).transpose(0, 1), randn(32, 7, 2).permute(2, 1, 0)
    for view in (*views, randn(1, 1, 32).expand(2, 7, 32)):
        x = view.detach().requires_grad_()
        (x64,) = fp64(x)
        out, wanted = kernels.swiglu(x, backend="triton"), kernels.swiglu(x64)
        assert out.shape == (2, 7, 16)
        assert_close(out, wanted, DTYPE, "out")
        assert_same_gradients(out, [x], wanted, [x64])
        assert_same_gradients(out.transpose(0, 1), [x], wanted.transpose(0, 1), [x64])
        assert_same_gradients(out[..., ::2], [x], wanted[..., ::2], [x64])


def test_large_gates() -> None:
    gates = torch.tensor([-3e4, -200.0, -90.0, 0.0, 90.0, 200.0, 3e4])
    x = torch.cat((gates, torch.full_like(gates, 0.5)))[None].to(randn(1)).requires_grad_()
    (x64,) = fp64(x)
    out, wanted = kernels.swiglu(x, backend="triton"), kernels.swiglu(x64)
    assert_close(out, wanted, DTYPE, "out")
    assert_same_gradients(out, [x], wanted, [x64])
