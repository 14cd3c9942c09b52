"""Attention in torch against a float64 reference, forwards and gradients."""

import math

import pytest
import torch
from operators import DTYPES, LENGTHS, TORCH, assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError


def slow_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Position by position, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    offset = k.shape[2] - q.shape[2]
    for t in range(q.shape[2]):
        end = offset + t + 1 if causal else k.shape[2]
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, :end]) / math.sqrt(q.shape[-1])
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, :end])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_matches_reference(backend: str, length: int, dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, length, 16, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, expected = (
        kernels.causal_attention(q, k, v, backend=backend),
        slow_attention(q64, k64, v64),
    )
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, q, k, v), gradients(expected, q64, k64, v64), strict=True)
    for name, (actual, wanted) in zip("qkv", pairs, strict=True):
        assert_close(actual, wanted, dtype, f"d{name}", floor=1.0)


@pytest.mark.parametrize("length", [64, 65, 200])
def test_attention_in_several_blocks_under_autocast(length: int) -> None:
    """fp32 queries and keys, as after a norm, and a value in bf16; strides of a packed tensor."""
    qkv = randn(2, length, 9, 32, dtype=torch.float32).requires_grad_()
    qkv64 = qkv.detach().double().requires_grad_()
    outs = []
    for packed, backend in ((qkv, "blocked"), (qkv64, "matmul")):
        q, k, v = (x.transpose(1, 2) for x in packed.split(3, dim=2))
        with torch.autocast("cpu", torch.bfloat16, enabled=packed is qkv):
            outs.append(
                kernels.causal_attention(
                    q, k, v.to(torch.bfloat16) if packed is qkv else v, backend=backend
                )
            )
    assert outs[0].dtype == torch.bfloat16
    assert_close(outs[0], outs[1], torch.bfloat16, "out")
    (actual,), (wanted,) = gradients(outs[0], qkv), gradients(outs[1], qkv64)
    assert_close(actual, wanted, torch.bfloat16, "gradient")


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (5, 33), (31, 63)])
def test_attention_of_the_last_queries(backend: str, queries: int, keys: int) -> None:
    q, k, v = (randn(2, 3, keys, 16, dtype=torch.float32, seed=i) for i in range(3))
    whole = slow_attention(q, k, v)[:, :, keys - queries :]
    part = kernels.causal_attention(q[:, :, keys - queries :], k, v, backend=backend)
    assert_close(part, whole, torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_without_mask(backend: str) -> None:
    q, k, v = (randn(2, 3, 9, 16, dtype=torch.float32, seed=i) for i in range(3))
    out = kernels.causal_attention(q, k, v, causal=False, backend=backend)
    assert_close(out, slow_attention(q, k, v, causal=False), torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_with_fewer_key_heads(backend: str) -> None:
    q = randn(2, 6, 9, 16, dtype=torch.float32)
    k, v = (randn(2, 2, 9, 16, dtype=torch.float32, seed=i) for i in (1, 2))
    out = kernels.causal_attention(q, k, v, backend=backend)
    wide = (x.repeat_interleave(3, dim=1) for x in (k, v))
    assert_close(out, slow_attention(q, *wide), torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_no_gradient_flows_from_a_position_to_later_inputs(backend: str) -> None:
    q, k, v = (randn(1, 2, 12, 16, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    out = kernels.causal_attention(q, k, v, backend=backend)
    for t in range(12):
        dk, dv = torch.autograd.grad(out[:, :, t].sum(), (k, v), retain_graph=True)
        assert (dk[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, : t + 1] != 0).all()


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_ignores_left_padding(backend: str) -> None:
    q, k, v = (randn(2, 3, 9, 16, dtype=torch.float32, seed=i) for i in range(3))
    out = kernels.causal_attention(q, k, v, start_BT=torch.tensor([[0], [4]]), backend=backend)
    assert_close(out[:1], slow_attention(q[:1], k[:1], v[:1]), torch.float32)
    real = (x[1:, :, 4:] for x in (q, k, v))
    assert_close(out[1:, :, 4:], slow_attention(*real), torch.float32)
    assert (out[1, :, :4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_within_documents(backend: str, dtype: torch.dtype) -> None:
    """Is the attention to each document by itself, gradients too."""
    lengths = [1, 7, 31, 24]
    q, k, v = (randn(2, 3, 63, 16, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    ids = torch.ones(2, 63, dtype=torch.long)
    ids[:, [0, 7, 38]] = 0  # each document's end
    start_BT = kernels.document_starts(ids, end_id=0)
    assert start_BT.tolist() == [[0] + [1] * 7 + [8] * 31 + [39] * 24] * 2
    out = kernels.causal_attention(q, k, v, start_BT=start_BT, backend=backend)
    inputs64 = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split(lengths, dim=2) for x in inputs64), strict=True)
    expected = torch.cat([slow_attention(*part) for part in parts], dim=2)
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, q, k, v), gradients(expected, *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient", floor=1.0)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_no_gradient_crosses_a_document_boundary(backend: str) -> None:
    q, k, v = (randn(1, 2, 12, 16, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    start = torch.tensor([0] * 5 + [5] * 7)
    out = kernels.causal_attention(q, k, v, start_BT=start, backend=backend)
    for t in range(12):
        dv = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)[0]
        seen = (torch.arange(12) >= start[t]) & (torch.arange(12) <= t)
        assert ((dv != 0).all(dim=(0, 1, 3)) == seen).all()
        assert ((dv != 0).any(dim=3).any(dim=1)[0] == seen).all()


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((1, 2, 5, 8), (1, 2, 4, 8), {}, "5 queries on 4 keys"),
        ((1, 3, 4, 8), (1, 2, 4, 8), {}, "3 query heads on 2 key heads"),
        ((1, 2, 4, 8), (2, 2, 4, 8), {}, "batch and head dimension must be the same"),
        ((2, 4, 8), (2, 4, 8), {}, r"needs \(B, H, T, D\)"),
        ((1, 0, 4, 8), (1, 2, 4, 8), {}, "0 query heads on 2 key heads"),
        ((3, 2, 4, 8), (3, 2, 4, 8), {"start_BT": torch.arange(2)}, r"expand to \(3, 4\)"),
        ((1, 2, 4, 8), (1, 2, 4, 8), {"start_BT": torch.ones(4)}, r"float32; it holds places"),
        (
            (1, 2, 4, 8),
            (1, 2, 4, 8),
            {"start_BT": torch.zeros(4, dtype=int, device="meta")},
            "on cpu and meta",
        ),
    ],
)
def test_attention_refuses_shapes_that_do_not_belong_together(
    q: tuple[int, ...], k: tuple[int, ...], options: dict[str, Tensor], message: str
) -> None:
    keys = randn(*k)
    with pytest.raises(InputError, match=message):
        kernels.causal_attention(randn(*q), keys, keys, **options)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16), (2, 2, 5, 0)], ids=str)
def test_attention_of_nothing(shape: tuple[int, ...], backend: str) -> None:
    q = torch.zeros(shape, requires_grad=True)
    k = torch.zeros(shape[0], 2, *shape[2:], requires_grad=True)
    for start_BT in (None, torch.zeros(shape[0], 1, dtype=torch.int32)):
        out = kernels.causal_attention(q, k, k, start_BT=start_BT, backend=backend)
        assert out.shape == shape
        out.sum().backward()
        assert (k.grad == 0).all()


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_of_no_queries(backend: str) -> None:
    k = torch.zeros(2, 2, 5, 16, requires_grad=True)
    out = kernels.causal_attention(torch.zeros(2, 2, 0, 16), k, k, backend=backend)
    assert out.shape == (2, 2, 0, 16)
    assert (torch.autograd.grad(out.sum(), k)[0] == 0).all()


@pytest.mark.parametrize("head_dim", [1, 129])
@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_of_inputs_with_any_strides(backend: str, head_dim: int) -> None:
    """Expanded, turned around, and of other dtypes than the queries, which decide."""
    q = randn(1, 1, 70, head_dim, dtype=torch.float32).expand(2, 3, -1, -1).requires_grad_()
    k = randn(2, 70, 3, head_dim, dtype=torch.float32, seed=1).transpose(1, 2).requires_grad_()
    v = randn(2, 3, 70, 1, seed=2).expand(-1, -1, -1, head_dim).requires_grad_()
    out = kernels.causal_attention(q, k, v, backend=backend)
    assert out.dtype == torch.float32
    inputs64 = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = slow_attention(*inputs64)
    assert_close(out, expected, torch.float32, "out")
    pairs = zip(gradients(out, q, k, v), gradients(expected, *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, torch.float32, "gradient", floor=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attention_in_blocks_under_autocast_on_a_gpu() -> None:
    """Where autocast would make the softmax fp32, and its gradient's products fail."""
    x = randn(1, 2, 70, 32, dtype=torch.float32).cuda().requires_grad_()
    with torch.autocast("cuda", torch.float16):
        out = kernels.causal_attention(x, x + 1, x * 2, backend="blocked")
    assert torch.autograd.grad(out.float().sum(), x)[0].isfinite().all()
