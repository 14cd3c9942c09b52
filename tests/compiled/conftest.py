"""Every test here runs with each variant of the C++ kernels that this machine has."""

from collections.abc import Iterator

import pytest
import torch

from tinylm.kernels import dispatch

try:
    from tinylm import _C
except ImportError:  # each file here is skipped, for want of what it tests
    VARIANTS: list[str] = []
else:
    VARIANTS = _C.instruction_sets()


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(VARIANTS[-1])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN until they are written; TINYLM_KERNELS is what it is by default."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.forget()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    dispatch.forget()


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies whole matrices runs in every variant, however slow."""
    monkeypatch.setattr(_C, "faster_than_own_products", lambda: None)
