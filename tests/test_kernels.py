"""Which implementation of an operator runs, and what all operators have in common."""

from collections.abc import Callable, Iterator

import pytest
import torch
from operators import TORCH, randn
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError
from tinylm.kernels import dispatch


@pytest.fixture
def chosen_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; what it chose is forgotten afterwards."""

    def choose(setting: str) -> None:
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, setting)
        dispatch.forget()

    yield choose
    choose("auto")


def test_environment_variable_chooses_the_reference(chosen_by: Callable[[str], None]) -> None:
    chosen_by("reference")
    assert dispatch.select("linear_cross_entropy", "cpu").implementation == "reference"
    assert dispatch.select("causal_attention", "cuda").implementation == "matmul"
    chosen_by("fastest")
    with pytest.raises(InputError, match=r"TINYLM_KERNELS is 'fastest'.*auto .*triton .*torch"):
        dispatch.select("causal_attention", "cpu")


def test_triton_is_not_chosen_by_itself_but_on_request(
    chosen_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)  # as if triton were installed
    chosen_by("auto")
    selection = dispatch.select("causal_attention", "cuda")
    assert selection.implementation == "sdpa"
    assert "not checked on this GPU yet" in selection.reason
    chosen_by("torch")
    assert dispatch.select("causal_attention", "cuda").implementation == "sdpa"
    chosen_by("triton")
    for operator, names in dispatch.IMPLEMENTATIONS.items():
        expected = "triton" if "triton" in names else dispatch.torch_choice(operator, "cuda")[0]
        assert dispatch.select(operator, "cuda").implementation == expected


def test_triton_that_cannot_run_is_replaced_and_named_once(
    chosen_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    chosen_by("triton")
    x = randn(1, 1, 2, 16, dtype=torch.float32)
    for _ in range(2):
        out = kernels.causal_attention(x, x, x)
        assert torch.equal(out, kernels.causal_attention(x, x, x, backend="blocked"))
    assert "triton is not installed" in dispatch.select("causal_attention", "cpu").reason
    (record,) = caplog.records
    assert record.getMessage() == (
        "causal_attention runs as blocked, not as a Triton kernel: triton is not installed"
    )


def test_unknown_backend_is_named() -> None:
    x = randn(1, 1, 2, 16, dtype=torch.float32)
    with pytest.raises(InputError, match="no backend 'flash'"):
        kernels.causal_attention(x, x, x, backend="flash")


WEIGHT = randn(8, seed=9)
OPERATORS = {
    "causal_attention": lambda x, **options: kernels.causal_attention(x, x + 1, x * 2, **options),
    "layer_norm": lambda x, **options: kernels.layer_norm(x, WEIGHT, **options),
    "rms_norm": lambda x, **options: kernels.rms_norm(x, WEIGHT, **options),
    "linear_cross_entropy": lambda x, **options: kernels.linear_cross_entropy(
        x[0, 0], x[0, 1], torch.arange(x.shape[2]), **options
    ),
}
BACKENDS = [(name, backend) for name in OPERATORS for backend in TORCH[name]]


# Their gradients are computed by hand, and are constants to autograd, which must not pass for it.
BY_HAND = [
    ("causal_attention", "sdpa"),
    ("causal_attention", "blocked"),
    ("causal_attention", "c++"),
    ("rms_norm", "c++"),
    ("rms_norm", "torch"),
    ("linear_cross_entropy", "chunked"),
    ("linear_cross_entropy", "c++"),
]


@pytest.mark.parametrize(("operator", "backend"), BACKENDS)
def test_second_derivatives_are_right_or_refused(operator: str, backend: str) -> None:
    def size_of_gradient(x: Tensor) -> Tensor:
        loss = OPERATORS[operator](x, backend=backend).square().sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    x = randn(1, 2, 5, 8).requires_grad_()
    if (operator, backend) in BY_HAND:
        with pytest.raises(RuntimeError, match=r"twice|not implemented"):
            size_of_gradient(x).backward()
        return
    size_of_gradient(x).backward()
    assert x.grad is not None
    direction = randn(1, 2, 5, 8, seed=1)
    ahead, behind = (size_of_gradient(x + s * direction).item() for s in (1e-5, -1e-5))
    assert float((x.grad * direction).sum()) == pytest.approx((ahead - behind) / 2e-5, rel=1e-4)


@pytest.mark.parametrize(("operator", "backend"), BACKENDS)
def test_autocast_leaves_fp64_alone(operator: str, backend: str) -> None:
    x = randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = OPERATORS[operator](x, backend=backend)
    assert torch.equal(out, OPERATORS[operator](x, backend=backend))
