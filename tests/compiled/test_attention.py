"""Causal attention in C++."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_kernels import INFINITY, LENGTHS, attention, check, heads, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels

pytest.importorskip("tinylm._C")


def plain_attention(*qkv: Tensor, **options: Any) -> Tensor:
    return kernels.causal_attention(*qkv, backend="matmul", **options)


@pytest.mark.parametrize("length", [*LENGTHS, 32, 64, 200])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_attention(length: int, head_dim: int, caplog: pytest.LogCaptureFixture) -> None:
    check(attention, plain_attention, *heads(2, 3, length, head_dim))
    assert not caplog.records


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.floats(0.01, 3.0))
def test_attention_of_any_shape_and_scale(B: int, H: int, T: int, scale: float) -> None:
    q, k, v = heads(B, H, T, 32)
    check(
        lambda *qkv: attention(*qkv, scale=scale),
        lambda *qkv: plain_attention(*qkv, scale=scale),
        q, k, v,
    )  # fmt: skip


def test_attention_of_packed_projections_and_fewer_key_heads() -> None:
    packed = randn(2, 45, 6 * 32, dtype=torch.bfloat16).requires_grad_()

    def split(x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        q, k, v = x.view(2, 45, 6, 32).transpose(1, 2).split((4, 1, 1), dim=1)
        return run(q, k, v).transpose(1, 2).reshape(2, 45, -1)

    check(lambda x: split(x, attention), lambda x: split(x, plain_attention), packed)


def test_attention_under_autocast_takes_fp32() -> None:
    qkv = [x.detach().float().requires_grad_() for x in heads(1, 2, 40, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*qkv)
    assert out.dtype == torch.bfloat16
    expected = plain_attention(*wide(*qkv))
    assert_close(out, expected, torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in gradients(out, *qkv))


def test_attention_survives_large_scores() -> None:
    q, k, v = heads(1, 1, 40, 32)
    with torch.no_grad():
        q *= 1000
        out = attention(q, k, v)
        assert_close(out, plain_attention(*wide(q, k, v)), torch.bfloat16)


@pytest.mark.parametrize("length", [33, 64])
def test_no_gradient_flows_from_a_position_to_later_inputs(length: int) -> None:
    qkv = heads(1, 2, length, 32)
    out = attention(*qkv)
    for t in (1, 7, 31, length - 1):
        for gradient in torch.autograd.grad(out[:, :, t].sum(), qkv[1:], retain_graph=True):
            assert (gradient[:, :, t + 1 :] == 0).all()
            assert (gradient[:, :, : t + 1] != 0).any()


@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_what_is_not_finite_in_attention_stays_in_its_head_and_is_seen(value: float) -> None:
    q, k, v = (x.detach() for x in heads(2, 2, 70, 32))
    k[0, 1, 40, 3] = value
    out = attention(q, k, v)
    assert not out[0, 1, 40:].isfinite().any(dim=-1).all()
    assert out[0, 1, :32].isfinite().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()
