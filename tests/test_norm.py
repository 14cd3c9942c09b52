"""The norms and the rotary embedding in torch against float64 references, gradients too."""

import math

import pytest
import torch
import torch.nn.functional as F
from operators import DTYPES, TORCH, assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 31, 128])
@pytest.mark.parametrize("backend", TORCH["layer_norm"])
def test_layer_norm(backend: str, width: int, residual: bool, dtype: torch.dtype) -> None:
    x, other = (randn(5, 3, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight, bias = (randn(width, dtype=dtype, seed=i).requires_grad_() for i in (2, 3))
    total = x + other if residual else x
    out = kernels.layer_norm(x, weight, bias, residual=other if residual else None, backend=backend)
    normed = out
    if isinstance(out, tuple):
        normed, summed = out
        assert torch.equal(summed, total)
    inputs64 = [t.detach().double().requires_grad_() for t in (total, weight, bias)]
    expected = F.layer_norm(inputs64[0], (width,), *inputs64[1:])
    assert_close(normed, expected, dtype, "out")
    if width > 1:  # at width 1 the gradient is 0 and only rounding is left
        pairs = zip(gradients(normed, x, weight, bias), gradients(expected, *inputs64), strict=True)
        for actual, wanted in pairs:
            assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("backend", TORCH["layer_norm"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_gradients_of_layer_norm_over_many_rows(parameters: torch.dtype, backend: str) -> None:
    """torch by itself adds up 2,048 rows of bf16 in bf16, and is off by 7 %."""
    x = randn(2048, 16, dtype=torch.bfloat16)
    weight = randn(16, dtype=parameters, seed=1).requires_grad_()
    bias = randn(16, dtype=parameters, seed=2).requires_grad_()
    out = kernels.layer_norm(x, weight, bias, backend=backend)
    inputs64 = [t.detach().double().requires_grad_() for t in (weight, bias)]
    expected = F.layer_norm(x.double(), (16,), *inputs64)
    pairs = zip(gradients(out, weight, bias), gradients(expected, *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, torch.bfloat16, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 31, 128])
@pytest.mark.parametrize("backend", TORCH["rms_norm"])
def test_rms_norm(backend: str, width: int, residual: bool, dtype: torch.dtype) -> None:
    x, other = (randn(5, 3, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = randn(width, dtype=dtype, seed=2).requires_grad_()
    total = x + other if residual else x
    out = kernels.rms_norm(x, weight, residual=other if residual else None, backend=backend)
    normed = out
    if isinstance(out, tuple):
        normed, summed = out
        assert torch.equal(summed, total)
    wide, weight64 = (t.detach().double().requires_grad_() for t in (total, weight))
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight64
    assert_close(normed, expected, dtype, "out")
    if width > 1:
        pairs = zip(gradients(normed, x, weight), gradients(expected, wide, weight64), strict=True)
        for actual, wanted in pairs:
            assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["rms_norm"])
def test_rms_norm_of_heads_scaled_apart(backend: str, dtype: torch.dtype) -> None:
    x = randn(2, 7, 9, 16, dtype=dtype).requires_grad_()
    heads = x[:, :, 2:5]  # neither contiguous nor all of it
    weight = randn(3, 16, dtype=dtype, seed=1).requires_grad_()
    out = kernels.rms_norm(heads, weight, backend=backend)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    heads64 = x64[:, :, 2:5]
    expected = heads64 / (heads64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight64
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, x, weight), gradients(expected, x64, weight64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_rotary_is_the_rotation_back(dtype: torch.dtype) -> None:
    cos, sin = kernels.rotary_tables(9, 6, theta=100.0)
    x = randn(2, 9, 3, 6, dtype=dtype).transpose(1, 2).requires_grad_()
    out = kernels.apply_rotary(x, cos, sin)
    first, second = x.detach().double().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    assert_close(out, x.detach().double() * cos.double() + turned * sin.double(), dtype, "out")
    (back,) = torch.autograd.grad(out, x, out.detach())
    assert_close(back, x, torch.float32 if dtype == torch.float64 else dtype)


def test_rotary_turns_pairs_by_their_position() -> None:
    cos, sin = kernels.rotary_tables(8, 6, theta=100.0)
    x = randn(1, 1, 8, 6, dtype=torch.float32)
    out = kernels.apply_rotary(x, cos, sin)
    for t in range(8):
        for d in range(3):
            angle = t * 100.0 ** (-2 * d / 6)
            a, b = x[0, 0, t, d], x[0, 0, t, d + 3]
            expected = a * math.cos(angle) - b * math.sin(angle)
            assert abs(out[0, 0, t, d] - expected) < 1e-5


@pytest.mark.parametrize("backend", TORCH["layer_norm"])
def test_norms_of_nothing(backend: str) -> None:
    x, weight = torch.zeros(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    norms = [kernels.layer_norm(x, weight, weight, backend=backend), kernels.rms_norm(x, weight)]
    for out in norms:
        assert out.shape == (0, 16)
        assert (torch.autograd.grad(out.sum(), weight)[0] == 0).all()


@pytest.mark.parametrize(
    ("operator", "weight", "options", "message"),
    [
        ("rms_norm", (7,), {}, r"shape \(2, 8\) with a weight of shape \(7,\)"),
        ("rms_norm", (3, 8), {}, "the same last dimensions"),
        ("rms_norm", (), {}, "the same last dimensions"),
        ("layer_norm", (1,), {}, "the same last dimensions"),
        ("layer_norm", (2, 8), {}, "one value per column"),
        ("layer_norm", (8,), {"bias": torch.zeros(1)}, "one value per column"),
        ("layer_norm", (8,), {"residual": torch.zeros(2, 8, device="meta")}, "cpu and meta"),
    ],
)
def test_norms_refuse_what_does_not_belong_together(
    operator: str, weight: tuple[int, ...], options: dict[str, Tensor], message: str
) -> None:
    for backend in TORCH[operator]:
        with pytest.raises(InputError, match=message):
            getattr(kernels, operator)(
                torch.ones(2, 8), torch.ones(weight), backend=backend, **options
            )
