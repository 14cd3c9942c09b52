"""The linear cross-entropy in torch against float64 references, forwards and gradients."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import DTYPES, TORCH, assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError

chunked = sys.modules["tinylm.kernels.linear_cross_entropy"]  # its function has its name


@pytest.mark.parametrize("rows", [1, 31, 100, 600])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy(backend: str, dtype: torch.dtype, with_bias: bool, rows: int) -> None:
    h = (randn(rows, 24) / 4).to(dtype).requires_grad_()  # logits of a usual size, 1 to 5
    weight = randn(97, 24, dtype=dtype, seed=1).requires_grad_()
    bias = randn(97, dtype=dtype, seed=2).requires_grad_() if with_bias else None
    targets = torch.arange(rows) * 7 % 97
    targets[1::5] = -100
    loss = kernels.linear_cross_entropy(h, weight, targets, bias_V=bias, backend=backend)
    inputs = [h, weight] + ([bias] if bias is not None else [])
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.cross_entropy(F.linear(*inputs64[:2], *inputs64[2:]), targets)
    assert_close(loss, expected, dtype, "loss")
    actual = torch.autograd.grad(loss * 3, inputs)
    wanted = torch.autograd.grad(expected * 3, inputs64)
    for name, a, b in zip(("h", "weight", "bias"), actual, wanted, strict=False):
        assert_close(a, b, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.0), (None, 0.1), (3.0, 0.1)])
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_with_more_terms(
    backend: str, softcap: float | None, z_loss: float, reduction: str, dtype: torch.dtype
) -> None:
    """Logits of about 5, so that a cap of 3 bends them; 300 rows are more than one chunk."""
    h, weight, bias = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(300, 24), (97, 24), (97,)])
    )
    inputs = [x.requires_grad_() for x in (h, weight, bias)]
    targets = torch.arange(300) * 7 % 97
    targets[1::5] = 3
    loss = kernels.linear_cross_entropy(
        h, weight, targets, bias_V=bias,
        ignore_index=3, softcap=softcap, z_loss=z_loss, reduction=reduction, backend=backend,
    )  # fmt: skip
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    logits = F.linear(*inputs64)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    picked = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected = -picked.log() + z_loss * logits.exp().sum(-1).log() ** 2
    expected = torch.where(targets == 3, 0.0, expected)
    if reduction != "none":
        expected = expected.sum() / ((targets != 3).sum() if reduction == "mean" else 1)
    assert_close(loss, expected, dtype, "loss")
    pairs = zip(gradients(loss, *inputs), gradients(expected, *inputs64), strict=True)
    for name, (actual, wanted) in zip(("h", "weight", "bias"), pairs, strict=True):
        assert_close(
            actual, wanted, dtype, f"d{name}", floor=1.0 if dtype == torch.bfloat16 else 1e-3
        )


def test_gradients_of_a_mean_of_row_losses_do_not_underflow() -> None:
    """A probability over a million rows is 0 in fp16."""
    h = randn(64, 16, dtype=torch.float16)
    weight = randn(97, 16, dtype=torch.float32, seed=1).requires_grad_()
    loss_N = kernels.linear_cross_entropy(
        h, weight, torch.arange(64), reduction="none", backend="chunked"
    )
    (dweight,) = torch.autograd.grad(loss_N.sum() / 1e6, weight)
    weight64 = weight.detach().double().requires_grad_()
    expected = F.cross_entropy(h.double() @ weight64.T, torch.arange(64), reduction="sum")
    assert_close(dweight * 1e6, torch.autograd.grad(expected, weight64)[0], torch.bfloat16, "dw")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, r"softcap is 0\.0; it must be above 0"),
        ({"reduction": "max"}, "reduction is 'max'; choose mean, sum or none"),
        ({"bias_V": torch.zeros(3)}, "one bias per token"),
        ({"targets_N": torch.zeros(3, dtype=torch.long)}, "one target per row"),
        ({"targets_N": torch.zeros(4)}, r"targets are torch\.float32"),
        ({"weight_VC": torch.zeros(9, 5)}, r"shapes \(4, 8\) and \(9, 5\)"),
        ({"weight_VC": torch.zeros(9, 8, device="meta")}, "on cpu and meta"),
    ],
)
def test_linear_cross_entropy_refuses_what_does_not_belong_together(
    options: dict[str, Any], message: str
) -> None:
    call = {"h_NC": torch.zeros(4, 8), "weight_VC": torch.zeros(9, 8)}
    call["targets_N"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        kernels.linear_cross_entropy(**call | options)


def test_linear_cross_entropy_under_autocast_computes_in_bf16() -> None:
    h, weight = randn(300, 24, dtype=torch.float32), randn(97, 24, dtype=torch.float32, seed=1)
    h.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(300) % 97
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(h, weight, targets, backend="chunked")
    exact = F.cross_entropy(F.linear(h.double(), weight.double()), targets)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 1e-2
    dh, dweight = torch.autograd.grad(loss, (h, weight))
    dh64, dweight64 = torch.autograd.grad(exact, (h, weight))
    assert dh.dtype == dweight.dtype == torch.float32
    assert_close(dh, dh64, torch.bfloat16)
    assert_close(dweight, dweight64, torch.bfloat16)


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0, 300.0, -300.0])
def test_linear_cross_entropy_of_any_size_of_logits(size: float) -> None:
    """In bf16, exponentials without a shift would overflow, or all vanish, beyond 88."""
    h = torch.full((300, 16), size, dtype=torch.bfloat16).requires_grad_()
    weight = (1 + randn(97, 16, dtype=torch.float32) / 10).bfloat16().requires_grad_()
    targets = torch.arange(300) % 97
    loss = kernels.linear_cross_entropy(h, weight / 16, targets, backend="chunked")
    h64, weight64 = (t.detach().double().requires_grad_() for t in (h, weight))
    logits = F.linear(h64, weight64 / 16)
    rounded = logits + (logits.bfloat16().double() - logits).detach()  # as products in bf16 are
    expected = F.cross_entropy(rounded, targets)
    assert_close(loss, expected, torch.bfloat16, "loss")
    wanted = torch.autograd.grad(expected, (h64, weight64))
    for actual, exact in zip(torch.autograd.grad(loss, (h, weight)), wanted, strict=True):
        assert_close(actual, exact, torch.bfloat16, "gradient", floor=1e-2)


def test_linear_cross_entropy_of_what_is_certain_is_not_negative() -> None:
    h = torch.eye(9, 16, dtype=torch.bfloat16).mul(30).requires_grad_()
    loss_N = kernels.linear_cross_entropy(
        h, torch.eye(97, 16, dtype=torch.bfloat16), torch.arange(9), backend="chunked"
    )
    assert 0 <= loss_N.item() < 1e-6


def test_linear_cross_entropy_computes_only_the_gradients_asked_for() -> None:
    h, weight = randn(9, 24, dtype=torch.float32), randn(97, 24, dtype=torch.float32, seed=1)
    h.requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(9), backend="chunked")
    loss.backward()
    assert h.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_of_nothing(backend: str) -> None:
    """As in torch: a mean over nothing is NaN, a sum 0."""
    h, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(9, 8, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        loss = kernels.linear_cross_entropy(
            h, weight, torch.zeros(0, dtype=torch.long), reduction=reduction, backend=backend
        )
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert (loss.sum() == 0) != (reduction == "mean")
        assert torch.autograd.grad(loss.sum(), weight)[0].shape == weight.shape


@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_of_no_vocabulary(backend: str) -> None:
    targets = torch.full((4,), -100)
    inputs = torch.ones(4, 8), torch.ones(0, 8), targets
    assert kernels.linear_cross_entropy(*inputs, reduction="sum", backend=backend) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_where_no_row_counts(
    backend: str, reduction: str, dtype: torch.dtype
) -> None:
    """As in torch: the mean is NaN, but its gradients are 0."""
    h, weight = (randn(n, 8, dtype=dtype).requires_grad_() for n in (4, 9))
    targets = torch.full((4,), 3)
    loss = kernels.linear_cross_entropy(
        h, weight, targets, ignore_index=3, reduction=reduction, backend=backend
    )
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), (h, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_targets_of_any_whole_numbers_within_the_vocabulary(
    backend: str, dtype: torch.dtype
) -> None:
    h, weight = randn(4, 8, dtype=dtype).requires_grad_(), randn(9, 8, dtype=dtype, seed=1)

    def loss(targets: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(h, weight, targets, backend=backend)

    expected = loss(torch.tensor([3, 0, 8, 1]))
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(loss(torch.tensor([3, 0, 8, 1], dtype=kind)), expected)
    assert torch.equal(loss(torch.tensor(5).expand(4)), loss(torch.full((4,), 5)))
    for outside in (-1, 9):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            loss(torch.tensor([3, 0, outside, 1]))


def test_linear_cross_entropy_without_gradients_computes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    original = chunked._chunked
    monkeypatch.setattr(chunked, "_chunked", lambda *a: asked.append(a[5]) or original(*a))
    h, weight = (randn(n, 8, dtype=torch.float32).requires_grad_() for n in (4, 9))
    with torch.no_grad():
        kernels.linear_cross_entropy(h, weight, torch.arange(4), backend="chunked")
    kernels.linear_cross_entropy(h, weight, torch.arange(4), backend="chunked")
    assert asked == [(False, False, False), (True, True, False)]
