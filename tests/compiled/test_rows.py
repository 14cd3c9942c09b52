"""What goes row by row in C++: SwiGLU, norms, rotary positions, exponentials of logits."""

from collections.abc import Callable

import pytest
import torch
from compiled_kernels import DTYPES, INFINITY, LENGTHS, check, wide
from operators import assert_close, randn
from torch import Tensor

from tinylm import kernels

compiled_cross_entropy = pytest.importorskip("tinylm.kernels.compiled.linear_cross_entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LENGTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (3 * randn(rows, 2 * width)).to(dtype).requires_grad_()
    check(
        lambda x: kernels.swiglu(x, backend="c++"),
        lambda x: kernels.swiglu(x, backend="torch"),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_what_is_large_or_not_finite(dtype: torch.dtype) -> None:
    gate = torch.tensor([-INFINITY, -1e30, -200.0, -90.0, -0.0, 90.0, 1e30, INFINITY, float("nan")])
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype).requires_grad_()
    results = []
    for backend in ("c++", "torch"):
        out = kernels.swiglu(x, backend=backend)
        results += [out, torch.autograd.grad(out.sum(), x)[0]]
    torch.testing.assert_close(results[0], results[2], equal_nan=True, rtol=1e-2, atol=1e-30)
    torch.testing.assert_close(
        results[1][:, :9], results[3][:, :9], equal_nan=True, rtol=1e-2, atol=1e-30
    )


def test_swiglu_of_any_strides_and_of_nothing() -> None:
    x = randn(6, 4, 10, dtype=torch.float32).transpose(0, 1)[:, ::2].requires_grad_()
    check(lambda x: kernels.swiglu(x, backend="c++"), lambda x: kernels.swiglu(x), x)
    assert kernels.swiglu(torch.zeros(0, 6), backend="c++").shape == (0, 3)
    assert kernels.swiglu(torch.zeros(3, 0), backend="c++").shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(1, 2), (31, 6), (33, 32), (63, 64), (100, 18)])
def test_norm_and_rotary(length: int, head_dim: int, dtype: torch.dtype) -> None:
    packed = randn(2, length, 4, head_dim, dtype=dtype).requires_grad_()
    weight = randn(3, head_dim, dtype=torch.float32, seed=1).requires_grad_()
    tables = kernels.rotary_tables(length, head_dim, 10_000.0)

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda x, w: kernels.norm_rotary(x[:, :, :3], w, *tables, backend=backend)

    check(run("c++"), run("separate"), packed, weight)


@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_row_that_is_not_finite_spoils_no_other(value: float) -> None:
    x = randn(1, 3, 1, 34, dtype=torch.float32)
    x[0, 1, 0, 5] = value
    tables = kernels.rotary_tables(3, 34, 10.0)
    out = kernels.norm_rotary(x, torch.ones(1, 34), *tables, backend="c++")
    assert out[:, ::2].isfinite().all()
    assert out[:, 1].isnan().any()


NORMS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]


@pytest.mark.parametrize(("dtype", "out_dtype"), NORMS)
@pytest.mark.parametrize("width", LENGTHS)
@pytest.mark.parametrize("rows", [1, 130])
def test_rms_norm(
    rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    x = (3 * randn(rows, width)).to(dtype).requires_grad_()
    weight = randn(width, dtype=torch.float32, seed=1).requires_grad_()
    out = kernels.rms_norm(x, weight, dtype=out_dtype, backend="c++")
    assert out.dtype == out_dtype
    inputs64 = wide(x, weight)
    expected = kernels.rms_norm(*inputs64, backend="reference")
    assert_close(out, expected, out_dtype)
    dout = randn(rows, width, dtype=out_dtype, seed=2)
    actual = torch.autograd.grad(out, (x, weight), dout)
    assert [g.dtype for g in actual] == [dtype, torch.float32]
    wanted = torch.autograd.grad(expected, inputs64, dout.double())
    for got, right in zip(actual, wanted, strict=True):
        assert_close(got, right, dtype, floor=1.0)
    assert not caplog.records


def test_rms_norm_of_any_strides_and_with_what_it_leaves_to_torch() -> None:
    x = randn(6, 4, 10, dtype=torch.float32).transpose(0, 1)[:, ::2].requires_grad_()
    weight = randn(10, dtype=torch.float32)
    check(
        lambda x: kernels.rms_norm(x, weight, backend="c++"),
        lambda x: kernels.rms_norm(x, weight.double(), backend="reference"),
        x,
    )
    wider = kernels.rms_norm(x, weight, dtype=torch.float64, backend="c++")
    assert_close(wider, kernels.rms_norm(x, weight).double(), torch.float32)
    assert kernels.rms_norm(torch.zeros(0, 10), weight, backend="c++").shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [*LENGTHS, 1000])
def test_exponentials(columns: int, dtype: torch.dtype) -> None:
    x = (5 * randn(4, columns)).to(dtype)
    x[1] += 300
    x[2, 1:] = -INFINITY
    expected = (x.double() - x.double().amax(1, keepdim=True)).exp()
    top, sums = compiled_cross_entropy.exponentials_(y := x.clone())
    assert torch.equal(top, x.float().amax(1))
    assert_close(y, expected, dtype)
    assert_close(sums, expected.sum(1), torch.float32)


def test_exponentials_of_what_is_not_finite() -> None:
    x = torch.zeros(4, 40)
    x[0, 3], x[1, 3], x[2] = float("nan"), INFINITY, -INFINITY
    _, sums = compiled_cross_entropy.exponentials_(x)
    assert sums.isnan().tolist() == [True, True, True, False]
