"""The linear cross-entropy as Triton kernels against fp64 references: outputs and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_inputs import (
    DEVICE,
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
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", LENGTHS)
def test_linear_cross_entropy(rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    h = among_nan(randn(rows, 24, seed=1).div(4).to(dtype))
    weight = among_nan(randn(97, 24, dtype=dtype, seed=2))
    bias = among_nan(randn(97, dtype=dtype, seed=3)) if with_bias else None
    targets = (torch.arange(rows) * 7 % 97).to(DEVICE)
    targets[1::5] = -100
    inputs = [h, weight] + ([] if bias is None else [bias])
    inputs64 = fp64(*inputs)
    expected = F.cross_entropy(F.linear(*inputs64), targets) * 1000  # as if by a loss scale
    loss = kernels.linear_cross_entropy(h, weight, targets, bias_V=bias, backend="triton") * 1000
    assert loss.dtype == torch.float32
    assert_close(loss, expected, dtype, "loss")
    actual = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs64)
    for i, (a, b, w) in enumerate(zip(actual, again, wanted, strict=True)):
        assert torch.equal(a, b)
        assert a.dtype == dtype
        assert_close(a, w, dtype, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("softcap", "z_loss"), [(3.0, 0.0), (None, 0.1), (3.0, 0.1)])
def test_linear_cross_entropy_with_more_terms(
    softcap: float | None, z_loss: float, reduction: str, dtype: torch.dtype
) -> None:
    """Logits of about 5, so that a cap of 3 bends them; each row has a gradient of its own."""
    h, weight = among_nan(randn(45, 24, dtype=dtype)), among_nan(randn(70, 24, dtype=dtype, seed=1))
    bias = among_nan(randn(70, seed=2))
    targets = (torch.arange(45) * 7 % 70).to(DEVICE)
    targets[1::5] = 3
    options: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "reduction": reduction}
    options["ignore_index"] = 3
    inputs, inputs64 = [h, weight, bias], fp64(h, weight, bias)
    cross_entropy = kernels.linear_cross_entropy
    loss = cross_entropy(h, weight, targets, bias_V=bias, backend="triton", **options)
    options["bias_V"] = inputs64[2]
    expected = cross_entropy(*inputs64[:2], targets, backend="reference", **options)
    assert_close(loss, expected, dtype, "loss")
    assert (loss[1::5] == 0).all() if reduction == "none" else loss.dim() == 0
    assert_same_gradients(loss, inputs, expected, inputs64)


def test_linear_cross_entropy_without_a_loss_scale_does_not_underflow() -> None:
    """A probability over a million rows is 0 in fp16."""
    h = randn(100, 16, dtype=torch.float16)
    weight = randn(97, 16, dtype=torch.float32, seed=1).requires_grad_()
    targets = torch.arange(100, device=DEVICE) % 97
    h64, weight64 = fp64(h, weight)
    loss = kernels.linear_cross_entropy(h, weight, targets, backend="triton")
    (dweight,) = torch.autograd.grad(loss / 1e6, weight)
    (wanted,) = torch.autograd.grad(F.cross_entropy(h64 @ weight64.T, targets), weight64)
    assert dweight.dtype == torch.float32
    assert_close(dweight * 1e6, wanted, torch.float16, "dweight")


def test_linear_cross_entropy_of_what_counts_nowhere_and_of_targets_out_of_range() -> None:
    h, weight = randn(5, 16).requires_grad_(), randn(20, 16, seed=1).requires_grad_()

    def loss(*targets: int, dtype: torch.dtype = torch.int64) -> Tensor:
        ids = torch.tensor(targets, device=DEVICE, dtype=dtype)
        return kernels.linear_cross_entropy(h, weight, ids, backend="triton", ignore_index=7)

    nothing = loss(7, 7, 7, 7, 7)
    assert nothing.isnan()  # as in torch: a mean over nothing, whose gradient is 0
    for gradient in torch.autograd.grad(nothing, (h, weight)):
        assert (gradient == 0).all()
    assert torch.equal(loss(1, 2, 3, 4, 5), loss(1, 2, 3, 4, 5, dtype=torch.int32))
    assert loss(1, 2, 3, 4, 20).isnan()
    assert loss(1, 2, 3, 4, -1).isnan()
    for gradient in torch.autograd.grad(loss(7, 1, 7, 7, 2), (h, weight)):
        assert gradient.isfinite().all()


def test_linear_cross_entropy_of_inputs_with_any_strides() -> None:
    targets = torch.arange(22, device=DEVICE)[::2]
    for h, weight in (
        (randn(1, 16).expand(11, 16), randn(16, 30).T),
        (randn(16, 11).T, randn(30, 1).expand(30, 16)),
    ):
        inputs = [h.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = kernels.linear_cross_entropy(*inputs, targets, backend="triton")
        inputs64 = fp64(*inputs)
        expected = F.cross_entropy(F.linear(*inputs64), targets)
        assert_same_gradients(loss, inputs, expected, inputs64)
