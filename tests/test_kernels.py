"""Which implementation of an operator runs, and what all operators have in common."""

from collections.abc import Callable, Iterator

import pytest
import torch
from operators import randn

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
        expected = "triton" if "triton" in names else "torch"
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
