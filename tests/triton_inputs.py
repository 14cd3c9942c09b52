"""What the tests of the Triton kernels share: where they run, inputs, tolerances.

The tests are in `triton_attention.py`, `triton_norm.py`, `triton_cross_entropy.py` and
`triton_operators.py`. `test_triton_kernels.py` runs them in a process of their own: in Triton's
interpreter, which has to be chosen before the kernels are imported, and on a GPU if there is one.
"""

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor

from tinylm.kernels import dispatch

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
# The products of 7.5 are fp16, so there the tests are; TRITON_OVERRIDE_ARCH=sm75 asks for them on
# another GPU, and in the interpreter.
ONLY_FP16 = triton.knobs.runtime.override_arch == "sm75" or (
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 0)
)
# Largest error relative to the largest value, by dtype of the inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float16] if ONLY_FP16 else [torch.float32, torch.float16]
if DEVICE == "cuda" and not ONLY_FP16:
    DTYPES.append(torch.bfloat16)  # the interpreter computes it wrongly
DTYPE = DTYPES[0]  # of tests that need no more than one
LENGTHS = [1, 7, 31, 33, 63, 100]
# The references on a GPU are not all deterministic, and need not be.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*eterministic"),
    pytest.mark.filterwarnings("ignore:Conversion of an array"),  # interpreter of Triton 3.6
]


@pytest.fixture(autouse=True)
def poisoned_and_never_falling_back(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every new tensor holds NaN until it is written, and only Triton kernels may run."""
    dispatch._fall_back.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    refused = [r.getMessage() for r in caplog.records if r.name == "tinylm"]
    assert not refused


def randn(*shape: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def among_nan(x: Tensor) -> Tensor:
    """``x`` as a view whose neighbours in memory are NaN, so that reading too far shows."""
    buffer = x.new_full([n + 3 for n in x.shape[:-1]] + [2 * x.shape[-1]], float("nan"))
    view = buffer[tuple(slice(0, n) for n in x.shape)]
    view.copy_(x)
    return view.requires_grad_()


def fp64(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), name
    error = (actual.double() - expected).abs().max().item()
    scale = expected.abs().max().clamp(min=1.0).item()
    assert error <= TOLERANCE[dtype] * scale, f"{name}: error {error:.3g}, scale {scale:.3g}"


def assert_same_gradients(
    out: Tensor, inputs: list[Tensor], expected: Tensor, inputs64: list[Tensor]
) -> None:
    """Also that they are the same, bit for bit, a second time."""
    dout = randn(*out.shape, dtype=out.dtype, seed=99)
    actual = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    again = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    wanted = torch.autograd.grad(expected, inputs64, dout.double(), retain_graph=True)
    for i, (a, b, w) in enumerate(zip(actual, again, wanted, strict=True)):
        assert torch.equal(a, b), f"gradient {i} differs when repeated"
        assert a.dtype == inputs[i].dtype
        assert_close(a, w, inputs[i].dtype, f"gradient {i}")
