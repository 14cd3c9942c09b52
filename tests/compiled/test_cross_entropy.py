"""A head with its cross-entropy in C++."""

from collections.abc import Callable

import pytest
import torch
from compiled_kernels import DTYPES, INFINITY, LENGTHS, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels

_C = pytest.importorskip("tinylm._C")
compiled = pytest.importorskip("tinylm.kernels.compiled.linear_cross_entropy")


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("z_loss", "with_bias"), [(0.0, True), (1e-2, False)])
@pytest.mark.parametrize("width", [24, 32])
def test_linear_cross_entropy(
    width: int, z_loss: float, with_bias: bool, reduction: str, dtype: torch.dtype
) -> None:
    h, weight, bias = randn(300, width), randn(101, width, seed=1) / 3, randn(101, seed=2)
    targets = torch.arange(300) % 101
    targets[::7] = -100
    inputs = [x.to(dtype).requires_grad_() for x in (h, weight, bias)[: 2 + with_bias]]

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda h, w, b=None: kernels.linear_cross_entropy(
            h, w, targets, z_loss=z_loss, bias_V=b, reduction=reduction, backend=backend
        )

    inputs64 = wide(*inputs)
    losses = run("c++")(*inputs), run("reference")(*inputs64)
    assert losses[0].dtype == torch.float32
    assert_close(*losses, dtype, "loss")
    pairs = zip(gradients(losses[0], *inputs), gradients(losses[1], *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient")


def head_and_reference(
    N: int, C: int, V: int, with_bias: bool, z_loss: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(loss_N, dh, dweight and perhaps dbias), of C++ and in fp64 of the same rounded weights."""
    h, weight = randn(N, C, dtype=torch.bfloat16), randn(V, C, dtype=torch.float32, seed=1) / C**0.5
    bias = randn(V, dtype=torch.float32, seed=2) if with_bias else None
    targets, counts = (3 * torch.arange(N) + 2) % V, randn(N, dtype=torch.float32, seed=3)
    targets[5::7] = -1
    *actual, right = compiled.head_cross_entropy(h, weight, bias, targets, counts, -1, z_loss)
    assert right
    inputs = wide(*(x for x in (h, weight.bfloat16(), bias) if x is not None))
    loss_N = kernels.linear_cross_entropy(
        *inputs[:2], targets, -1, z_loss=z_loss, bias_V=inputs[2] if with_bias else None,
        reduction="none", backend="reference",
    )  # fmt: skip
    expected = torch.autograd.grad((loss_N * counts).sum(), inputs)
    return tuple(actual[: 3 + with_bias]), (loss_N.detach(), *expected)


@pytest.mark.parametrize("rows", [*LENGTHS, 300, 600])
@pytest.mark.parametrize(("width", "vocabulary"), [(32, 1), (96, 33), (32, 1023), (64, 2100)])
def test_head_cross_entropy(rows: int, width: int, vocabulary: int) -> None:
    """Parts of a chunk of rows, of a block of tokens, of a tile; one token that is certain."""
    for with_bias, z_loss in ((False, 0.0), (True, 1e-2)):
        actual, expected = head_and_reference(rows, width, vocabulary, with_bias, z_loss)
        # The difference of two numbers whose size is that of logits.
        assert_close(actual[0], expected[0], torch.float32, "loss", floor=1.0)
        assert (actual[0] >= 0).all()
        for got, wanted, name in zip(actual[1:], expected[1:], ("dh", "dw", "db"), strict=False):
            assert_close(got, wanted, torch.bfloat16, name, floor=1e-2)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("width", [24, 32])
def test_gradients_may_be_asked_for_again_and_scaled(width: int) -> None:
    """They are found with the loss, and handed on as they are where nothing scales them."""
    h = randn(40, width, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, width, dtype=torch.float32, seed=1).requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++")
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (h, weight), retain_graph=True)
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++")
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert h.grad is not None
    assert weight.grad is not None
    for grad, once in zip((h.grad, weight.grad), kept, strict=True):
        assert torch.equal(grad, 2 * once)
    for scaled, once in zip(torch.autograd.grad(3 * loss, (h, weight)), kept, strict=True):
        assert_close(scaled, 3 * once.double(), torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.sampled_from([32, 64]), st.integers(1, 140), st.booleans())
def test_head_cross_entropy_of_any_size(N: int, C: int, V: int, with_bias: bool) -> None:
    actual, expected = head_and_reference(N, C, V, with_bias, 0.0)
    assert_close(actual[0], expected[0], torch.float32, "loss", floor=1.0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_close(got, wanted, torch.bfloat16, floor=1e-2)


def test_a_certain_token_leaves_no_gradient() -> None:
    """Where its probability is 1 but for 1e-8, rounding of its exponential must not show."""
    h, weight = torch.ones(40, 32, dtype=torch.bfloat16), torch.zeros(50, 32)
    weight[7] = 0.75
    targets = torch.full((40,), 7)
    loss, dh, dweight, _, right = compiled.head_cross_entropy(h, weight, None, targets, None, -1, 0)
    assert right
    expected = torch.tensor(24.0).neg().exp().mul(49).log1p()
    assert_close(loss, expected.double().expand(40), torch.float32, floor=1.0)
    rounding = 24 * 2**-24  # of the exponential of 24 in fp32
    assert dh.abs().max() < rounding
    assert dweight.abs().max() < 40 * rounding


@pytest.mark.parametrize("value", [200.0, -200.0, float("nan"), INFINITY])
def test_logits_beyond_its_range_are_left_to_another_pass(value: float, own_products: None) -> None:
    h, weight = randn(40, 32, dtype=torch.bfloat16), randn(50, 32, dtype=torch.float32, seed=1)
    bias, targets = torch.full((50,), value), torch.arange(40)
    *_, right = compiled.head_cross_entropy(h, weight, bias, targets, None, -100, 0.0)
    assert not right
    inputs = [x.requires_grad_() for x in (h, weight, bias)]

    def run(backend: str, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.linear_cross_entropy(h, w, targets, bias_V=b, backend=backend)

    loss = run("c++", *inputs)
    if abs(value) < INFINITY:
        expected = run("reference", *wide(*inputs))
        assert_close(loss, expected, torch.bfloat16)
        pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(
            run("reference", *(x.float() for x in inputs)), inputs), strict=True)  # fmt: skip
        for actual, wanted in pairs:
            assert_close(actual, wanted, torch.bfloat16)
    else:
        assert loss.isnan()


@pytest.mark.parametrize("target", [50, -1, -101])
def test_a_target_that_is_no_token_is_refused(target: int, own_products: None) -> None:
    h = randn(40, 32, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, 32, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(40)
    targets[33] = target
    with pytest.raises((IndexError, RuntimeError), match=r"outside the vocabulary|out of bounds"):
        kernels.linear_cross_entropy(h, weight, targets, backend="c++")


def test_where_torch_multiplies_faster_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    h = randn(40, 32, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, 32, dtype=torch.bfloat16).requires_grad_()
    calls = []
    whole = compiled.head_cross_entropy
    monkeypatch.setattr(
        compiled,
        "head_cross_entropy",
        lambda *inputs: calls.append(1) or whole(*inputs),
    )
    losses = []
    for refusal in (None, "AMX"):
        monkeypatch.setattr(_C, "faster_than_own_products", lambda refusal=refusal: refusal)
        losses.append(kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++"))
    assert len(calls) == 1
    assert_close(losses[1], losses[0].double(), torch.bfloat16)


@pytest.mark.parametrize("size", [1e-3, 30.0, 3000.0])
def test_loss_of_any_size_of_logits(size: float) -> None:
    h, weight = randn(40, 16, dtype=torch.bfloat16) * size, randn(50, 16, dtype=torch.bfloat16)
    h.requires_grad_()
    targets = torch.arange(40)
    results = [
        kernels.linear_cross_entropy(x, w, targets, backend=backend)
        for backend, x, w in (("c++", h, weight), ("reference", *wide(h, weight)))
    ]
    assert_close(*results, torch.bfloat16)
    assert results[0] >= 0
