"""What stands before and after attention, in C++: norm and projection, projection and residual."""

from collections.abc import Callable

import pytest
import torch
from compiled_kernels import INFINITY, LENGTHS, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError
from tinylm.kernels import dispatch

pytest.importorskip("tinylm._C")


def before_inputs(rows: tuple[int, ...], C: int, outputs: int) -> list[Tensor]:
    """x, and weights of a norm and a matrix; this is exact in bf16."""
    x, norm = randn(*rows, C, dtype=torch.float32), randn(C, dtype=torch.float32, seed=1)
    weight = randn(outputs, C, dtype=torch.bfloat16, seed=2) / C**0.5
    return [t.float().requires_grad_() for t in (x, norm, weight)]


def after_inputs(rows: tuple[int, ...], C: int, inputs: int) -> list[Tensor]:
    """x, what is projected in bf16, and a matrix that is exact in it."""
    x, a = randn(*rows, C, dtype=torch.float32), randn(*rows, inputs, dtype=torch.bfloat16, seed=1)
    weight = (randn(C, inputs, dtype=torch.bfloat16, seed=2) / inputs**0.5).float()
    return [t.requires_grad_() for t in (x, a, weight)]


def before(*inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return kernels.norm_linear(*inputs, backend="c++")


def after(*inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return kernels.linear_residual(*inputs, backend="c++")


OPERATORS = pytest.mark.parametrize(
    ("run", "inputs_of", "plain"),
    [
        (before, before_inputs, kernels.norm_linear),
        (after, after_inputs, kernels.linear_residual),
    ],
    ids=["norm_linear", "linear_residual"],
)
Run = Callable[..., Tensor]
Inputs = Callable[..., list[Tensor]]


def check(run: Run, plain: Run, *inputs: Tensor) -> None:
    """Outputs and gradients are those of fp64, with the tolerance of products of bf16."""
    inputs64 = wide(*inputs)
    out, expected = run(*inputs), plain(*inputs64, backend="separate")
    assert out.dtype == (torch.bfloat16 if run is before else torch.float32)
    assert_close(out, expected, torch.bfloat16, "out")
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs64), strict=True)
    for number, ((actual, wanted), x) in enumerate(zip(pairs, inputs, strict=True)):
        assert actual.dtype == x.dtype
        assert_close(actual, wanted, torch.bfloat16, f"gradient {number}", floor=1.0)


@OPERATORS
@pytest.mark.parametrize("rows", [*LENGTHS, 128, 129, 300, 1100])
@pytest.mark.parametrize(("C", "other"), [(32, 32), (64, 96), (128, 64)])
def test_projections(
    run: Run,
    inputs_of: Inputs,
    plain: Run,
    rows: int,
    C: int,
    other: int,
    own_products: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Parts of a block of rows, and of the groups whose sums are added up."""
    check(run, plain, *inputs_of((rows,), C, other))
    assert not caplog.records


@OPERATORS
@pytest.mark.usefixtures("own_products")
@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 90),
    C=st.sampled_from([32, 64]),
    other=st.sampled_from([32, 96]),
)
def test_any_rows(
    run: Run, inputs_of: Inputs, plain: Run, B: int, T: int, C: int, other: int
) -> None:
    check(run, plain, *inputs_of((B, T), C, other))


@OPERATORS
def test_any_strides(run: Run, inputs_of: Inputs, plain: Run, own_products: None) -> None:
    *first, weight = inputs_of((50, 2), 32, 64)
    rows = [x.detach().transpose(0, 1).requires_grad_() if x.dim() == 3 else x for x in first]
    check(run, plain, *rows, weight)
    check(run, plain, *first, weight.detach().t().contiguous().t().requires_grad_())
    out = run(*first, weight)
    dout = torch.ones(()).to(out.dtype).expand_as(out)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, [*first, weight], dout))


@OPERATORS
@pytest.mark.parametrize("value", [1e4, -1e4, float("nan"), INFINITY])
def test_what_is_large_or_not_finite(
    run: Run, inputs_of: Inputs, plain: Run, value: float, own_products: None
) -> None:
    """It stays in its row, and is seen."""
    inputs = inputs_of((70,), 32, 32)
    with torch.no_grad():
        inputs[0][40, 3] = value
    if abs(value) < INFINITY:
        return check(run, plain, *inputs)
    out = run(*inputs)
    others = torch.arange(70) != 40
    assert out[others].isfinite().all()
    assert not out[40].isfinite().all()
    if run is before:  # the other passes the gradient of x on as it is
        dx = gradients(out, *inputs)[0]
        assert dx[others].isfinite().all()
        assert not dx[40].isfinite().all()
    return None


@pytest.mark.parametrize(
    ("run", "inputs_of", "change", "reason"),
    [
        (before, before_inputs, lambda *i: [t.double() for t in i], "products in float64"),
        (before, before_inputs, lambda x, n, w: (x, n, w.bfloat16()), "not fp32"),
        (before, before_inputs, lambda x, n, w: (x, n, w[:24]), "widths 32 and 24"),
        (before, before_inputs, lambda x, n, w: (x[:0], n, w), "of nothing"),
        (after, after_inputs, lambda x, a, w: (x, a.float(), w), "of fp32; it takes bf16"),
        (after, after_inputs, lambda x, a, w: (x.bfloat16(), a, w), "not fp32"),
        (after, after_inputs, lambda x, a, w: (x[:, :24], a, w[:24]), "widths 32 and 24"),
        (after, after_inputs, lambda x, a, w: (x[:0], a[:0], w), "of nothing"),
    ],
)
def test_calls_that_are_not_taken_run_apart(
    run: Run,
    inputs_of: Inputs,
    change: Callable[..., list[Tensor]],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = change(*(t.detach() for t in inputs_of((5,), 32, 32)))
    dispatch.forget()
    assert run(*inputs).shape == (*inputs[0].shape[:-1], len(inputs[2]))
    (record,) = caplog.records
    operator = "norm_linear" if run is before else "linear_residual"
    assert record.getMessage().startswith(f"{operator} runs as separate, not in C++: of ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("place", range(3))
@OPERATORS
def test_what_does_not_belong_together(run: Run, inputs_of: Inputs, plain: Run, place: int) -> None:
    inputs = inputs_of((5,), 32, 64)
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(InputError, match=r"of shapes? .* they must be"):
        run(*inputs)
