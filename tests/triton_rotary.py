"""QK-norm with rotary positions as a Triton kernel against fp64: odd shapes, strides, repeats."""

import pytest
import torch
from torch import Tensor
from triton_inputs import (
    DTYPE,
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


def tables(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of which the halves differ, as those of a model's do not."""
    cos, sin = kernels.rotary_tables(length, 2 * width, 10_000.0)
    return cos[:, :width].to(like.device), sin[:, :width].to(like.device)


def expected(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """From the formula, in fp64: each pair (d, d + D / 2) turned as a complex number."""
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    first, second = n.chunk(2, dim=-1)
    (cos1, cos2), (sin1, sin2) = (t[:, None].double().chunk(2, dim=-1) for t in (cos, sin))
    return torch.cat((first * cos1 - second * sin1, second * cos2 + first * sin2), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "width"),
    [*((n, 32) for n in LENGTHS), (33, 2), (31, 10), (7, 64), (5, 128), (3, 256)],
)
@pytest.mark.parametrize("alike", [True, False])
def test_norm_rotary(alike: bool, length: int, width: int, dtype: torch.dtype) -> None:
    x = among_nan(randn(2, length, 3, width, dtype=dtype))
    weight = among_nan(randn(3, width, dtype=torch.float32, seed=1))
    placed = kernels.rotary_tables(length, width, 100.0) if alike else tables(length, width, x)
    cos, sin = (table.to(x.device) for table in placed)
    inputs64 = fp64(x, weight)
    out = kernels.norm_rotary(x, weight, cos, sin, backend="triton")
    assert out.dtype == dtype
    assert out.is_contiguous()
    wanted = expected(*inputs64, cos, sin)
    assert_close(out, wanted, dtype, "out")
    assert_same_gradients(out, [x, weight], wanted, inputs64)


def test_what_the_model_passes() -> None:
    """Queries and keys as a part of a projection, and a gradient laid out by heads."""
    qkv = randn(2, 33, 9, 16).requires_grad_()
    weight = randn(6, 16, seed=1).requires_grad_()
    cos, sin = (t[5:38].to(qkv.device) for t in kernels.rotary_tables(40, 16, 100.0))
    inputs64 = fp64(qkv, weight)
    out = kernels.norm_rotary(qkv[:, :, :6], weight, cos, sin, backend="triton").transpose(1, 2)
    wanted = expected(inputs64[0][:, :, :6], inputs64[1], cos, sin).transpose(1, 2)
    assert_close(out, wanted, DTYPE, "out")
    assert_same_gradients(out, [qkv, weight], wanted, inputs64)
    assert_same_gradients(out[..., ::2], [qkv, weight], wanted[..., ::2], inputs64)


def test_strides_of_any_kind() -> None:
    weight = randn(1, 1, seed=1).expand(3, 32).detach().requires_grad_()
    cos, sin = (t.to(weight.device) for t in kernels.rotary_tables(7, 32, 100.0))
    views = randn(2, 32, 3, 7).permute(0, 3, 2, 1), randn(1, 1, 3, 32).expand(2, 7, 3, 32)
    for view in views:
        x = view.detach().requires_grad_()
        inputs64 = fp64(x, weight)
        out = kernels.norm_rotary(x, weight, cos, sin, backend="triton")
        wanted = expected(*inputs64, cos, sin)
        assert_close(out, wanted, DTYPE, "out")
        assert_same_gradients(out, [x, weight], wanted, inputs64)


def test_it_is_what_one_after_the_other_gives() -> None:
    x, weight = randn(2, 31, 3, 32), randn(3, 32, seed=1)
    cos, sin = (t.to(x.device) for t in kernels.rotary_tables(31, 32, 100.0))
    ours, theirs = (
        kernels.norm_rotary(x, weight, cos, sin, backend=name) for name in ("triton", "separate")
    )
    assert_close(ours, theirs.double(), DTYPE, "out")
