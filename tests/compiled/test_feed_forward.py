"""The feed-forward layer in C++."""

from collections.abc import Callable

import pytest
import torch
from compiled_kernels import INFINITY, LENGTHS, layer_inputs, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_close, gradients
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError
from tinylm.kernels import dispatch

pytest.importorskip("tinylm._C")


def layer(*inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return kernels.feed_forward(*inputs, backend="c++")


def check_layer(*inputs: Tensor) -> None:
    """As `check`, with the tolerance of products of bf16."""
    inputs64 = wide(*inputs)
    out, expected = layer(*inputs), kernels.feed_forward(*inputs64, backend="separate")
    assert out.dtype == torch.float32
    assert_close(out, expected, torch.bfloat16, "out")
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs64), strict=True)
    for name, (actual, wanted) in zip(("dx", "dnorm", "dup", "ddown"), pairs, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, wanted, torch.bfloat16, name, floor=1.0)


@pytest.mark.parametrize("rows", [*LENGTHS, 128, 129, 300, 1100])
@pytest.mark.parametrize(("C", "F"), [(32, 32), (64, 96), (128, 64)])
def test_feed_forward(
    rows: int, C: int, F: int, own_products: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts of a block of rows, and of the groups whose sums are added up."""
    check_layer(*layer_inputs((rows,), C, F))
    assert not caplog.records


@pytest.mark.usefixtures("own_products")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.sampled_from([32, 64]), st.sampled_from([32, 96]))
def test_feed_forward_of_any_rows(B: int, T: int, C: int, F: int) -> None:
    check_layer(*layer_inputs((B, T), C, F))


def test_feed_forward_of_any_strides(own_products: None) -> None:
    x, *weights = layer_inputs((50, 2), 32, 32)
    check_layer(x.detach().transpose(0, 1).requires_grad_(), *weights)
    up = weights[1].detach().t().contiguous().t().requires_grad_()
    check_layer(x, weights[0], up, weights[2])


@pytest.mark.parametrize("value", [1e4, -1e4, float("nan"), INFINITY])
def test_feed_forward_of_what_is_large_or_not_finite(value: float, own_products: None) -> None:
    """It stays in its row, and is seen; in the sums over rows too."""
    x, *weights = layer_inputs((70,), 32, 32)
    with torch.no_grad():
        x[40, 3] = value
    if abs(value) < INFINITY:
        return check_layer(x, *weights)
    out = layer(x, *weights)
    dx, *sums = gradients(out, x, *weights)
    others = torch.arange(70) != 40
    for rows in (out, dx):
        assert rows[others].isfinite().all()
        assert not rows[40].isfinite().all()
    for total in sums[:2]:
        assert not total.isfinite().all()
    return None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x, n, u, d: (x.double(), n.double(), u.double(), d.double()),
            "products in float64",
        ),
        (lambda x, n, u, d: (x, n, u, d.bfloat16()), "not fp32"),
        (lambda x, n, u, d: (x[:, :24], n[:24], u[:, :24], d[:24]), "widths 24 and 32"),
        (lambda x, n, u, d: (x[:0], n, u, d), "of nothing"),
    ],
)
def test_layers_that_are_not_taken_run_apart(
    change: Callable[..., tuple[Tensor, ...]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = change(*(t.detach() for t in layer_inputs((5,), 32, 32)))
    dispatch.forget()
    out = layer(*inputs)
    assert out.shape == inputs[0].shape
    (record,) = caplog.records
    assert record.getMessage().startswith("feed_forward runs as separate, not in C++: of ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("place", range(4))
def test_weights_of_a_layer_that_do_not_belong_together(place: int) -> None:
    inputs = layer_inputs((5,), 32, 64)
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(InputError, match=r"feed_forward of shape .* they must be"):
        layer(*inputs)
