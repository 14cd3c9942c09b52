"""Attention as Triton kernels against fp64 references: outputs, gradients, odd shapes, repeats."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_inputs import (
    DEVICE,
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
from tinylm.kernels.triton.common import dense_last

pytestmark = WARNINGS


def check_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    out = kernels.causal_attention(q, k, v, backend="triton", **options)
    qkv64 = fp64(q, k, v)
    expected = kernels.causal_attention(*qkv64, backend="matmul", **options)
    assert out.dtype == q.dtype
    assert_close(out, expected, q.dtype, "out")
    again = kernels.causal_attention(q, k, v, backend="triton", **options)
    assert torch.equal(out, again)
    assert_same_gradients(out, [q, k, v], expected, qkv64)


def starts(length: int, *documents: int) -> Tensor:
    """start_BT of two sequences: documents of these lengths, and the same turned around."""
    rows = []
    for lengths in (documents, documents[::-1]):
        places = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
        rows.append(places[:length])
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention(length: int, dtype: torch.dtype) -> None:
    check_attention(*(among_nan(randn(1, 2, length, 16, dtype=dtype, seed=i)) for i in range(3)))


@pytest.mark.parametrize("head_dim", [1, 24, 32, 64, 128])
@pytest.mark.parametrize("length", [20, 70])
def test_attention_of_other_head_dimensions(length: int, head_dim: int) -> None:
    shape = 1, 2, length, head_dim
    check_attention(*(among_nan(randn(*shape, dtype=torch.float16, seed=i)) for i in range(3)))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (5, 33), (31, 63), (40, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_the_last_queries(causal: bool, queries: int, keys: int) -> None:
    q = among_nan(randn(2, 2, queries, 16))
    k, v = (among_nan(randn(2, 2, keys, 16, seed=i)) for i in (1, 2))
    check_attention(q, k, v, causal=causal, scale=0.3)


def test_attention_to_4096_positions() -> None:
    """All queries on a GPU, the last ones in the interpreter, which takes seconds for these."""
    queries = 4096 if DEVICE == "cuda" else 33
    q = among_nan(randn(1, 1, queries, 16, dtype=torch.float16))
    k, v = (among_nan(randn(1, 1, 4096, 16, dtype=torch.float16, seed=i)) for i in (1, 2))
    check_attention(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [(1, 2, 4), (31, 1), (40, 23), (3, 64, 33)], ids=str)
def test_attention_within_documents(documents: tuple[int, ...], dtype: torch.dtype) -> None:
    length = sum(documents)
    qkv = (among_nan(randn(2, 1, length, 16, dtype=dtype, seed=i)) for i in range(3))
    check_attention(*qkv, start_BT=starts(length, *documents))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(20, 20), (40, 70), (3, 70)])
def test_attention_after_left_padding(queries: int, keys: int, causal: bool) -> None:
    """Also where a query, or a whole tile of them, sees nothing, and where none sees anything."""
    q = among_nan(randn(3, 2, queries, 16))
    k, v = (among_nan(randn(3, 1, keys, 16, seed=i)) for i in (1, 2))
    start = torch.tensor([[5], [keys - 2], [keys]], device=DEVICE)
    check_attention(q, k, v, start_BT=start, causal=causal)
    out = kernels.causal_attention(q, k, v, start_BT=start, causal=causal, backend="triton")
    assert (out[2] == 0).all()
    if causal:
        assert (out[1, :, :-2] == 0).all()


def test_attention_of_starts_in_any_order() -> None:
    """Nothing is assumed about them: no order, none below 0, none beyond the keys."""
    q, k, v = (among_nan(randn(1, 1, 140, 16, seed=i)) for i in range(3))
    start = torch.randint(-20, 160, (1, 140), generator=torch.Generator().manual_seed(0))
    check_attention(q, k, v, start_BT=start.to(DEVICE))


def test_attention_of_a_start_beyond_every_key() -> None:
    """One of 2⁴⁰ is not taken for the 0 that its lower half is: the query sees nothing."""
    q, k, v = (randn(1, 1, 40, 16, seed=i) for i in range(3))
    start = torch.full((1, 1), 2**40, device=DEVICE)
    for queries in (40, 1):
        out = kernels.causal_attention(q[:, :, -queries:], k, v, start_BT=start, backend="triton")
        assert (out == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (2, 40), (2, 700)])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_attention_does_not_hide_what_is_not_a_number(
    started: bool, queries: int, keys: int
) -> None:
    """Not even where rows are zero that see nothing: a run that goes wrong has to show."""
    q = randn(1, 2, queries, 16)
    q[0, 0, 1] = float("nan")
    k, v = (randn(1, 2, keys, 16, seed=i) for i in (1, 2))
    start = torch.tensor([[5]], device=DEVICE) if started else None
    with torch.no_grad():
        out = kernels.causal_attention(q, k, v, start_BT=start, backend="triton", causal=False)
    assert out[0, 0, 1].isnan().all()
    out[0, 0, 1] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [12, 60])
def test_no_gradient_crosses_a_document_boundary(length: int) -> None:
    q, k, v = (randn(2, 1, length, 16, seed=i).requires_grad_() for i in range(3))
    start = starts(length, length // 3, length - length // 3)
    out = kernels.causal_attention(q, k, v, start_BT=start, backend="triton")
    for t in range(0, length, 7):
        dk, dv = torch.autograd.grad(out[:, :, t].sum(), (k, v), retain_graph=True)
        for b in range(2):
            seen = slice(int(start[b, t]), t + 1)
            assert (dv[b, :, seen] != 0).all()
            for gradient in (dk[b].clone(), dv[b].clone()):
                gradient[:, seen] = 0
                assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "started"), [((2, 2), False), ((6, 2), True)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (1, 100), (1, 700), (4, 515)])
def test_attention_of_few_queries_on_many_keys(
    queries: int, keys: int, heads: tuple[int, int], started: bool, dtype: torch.dtype
) -> None:
    """As in decoding, where keys and values are parts of a longer buffer.

    Without gradients, which the kernels of training compute.
    """
    q = randn(2, heads[0], queries, 16, dtype=dtype)
    k, v = (among_nan(randn(2, heads[1], keys, 16, dtype=dtype, seed=i)) for i in (1, 2))
    start = torch.tensor([[keys // 2], [keys]], device=DEVICE) if started else None
    with torch.no_grad():
        out = kernels.causal_attention(q, k, v, start_BT=start, backend="triton")
        expected = kernels.causal_attention(*fp64(q, k, v), start_BT=start, backend="matmul")
    assert_close(out, expected, dtype, "out")


def test_gradients_of_few_queries_on_many_keys() -> None:
    q = among_nan(randn(1, 2, 2, 16))
    k, v = (among_nan(randn(1, 1, 300, 16, seed=i)) for i in (1, 2))
    check_attention(q, k, v)


def test_decoding_splits_keys_between_programs() -> None:
    """Else the test above would not test the second kernel; a short call needs only the first."""
    from tinylm.kernels.triton import attention_decode

    x = randn(1)
    several = 1000 * attention_decode.processors(x)
    assert attention_decode.chunk_for(x, 1, several, 64) < several
    assert attention_decode.chunk_for(x, 1, 100, 64) >= 100
    assert attention_decode.chunk_for(x, several, several, 64) >= several


@pytest.mark.parametrize(("length", "head_dim"), [(9, 16), (33, 32), (31, 128), (40, 64), (70, 16)])
def test_attention_with_fewer_key_heads(length: int, head_dim: int) -> None:
    """In one program per head of keys where that has room for it, in tiles elsewhere."""
    q = among_nan(randn(2, 6, length, head_dim))
    k, v = (among_nan(randn(2, 2, length, head_dim, seed=i)) for i in (1, 2))
    check_attention(q, k, v)


@pytest.mark.parametrize("length", [12, 40])
def test_attention_of_packed_projections(length: int) -> None:
    """As the model calls it: views of one matrix product, and gradients back into it."""
    packed = randn(2, length, 6, 16).requires_grad_()
    packed64 = fp64(packed)[0]
    views = (x.transpose(1, 2) for x in packed.split([2, 2, 2], dim=2))
    views64 = (x.transpose(1, 2) for x in packed64.split([2, 2, 2], dim=2))
    views = list(views)
    assert all(dense_last(x) is x for x in views)  # and so does the kernel read them
    out = kernels.causal_attention(*views, backend="triton")
    assert out.transpose(1, 2).is_contiguous()  # the next projection reads it without a copy
    expected = kernels.causal_attention(*views64, backend="matmul")
    assert_same_gradients(out, [packed], expected, [packed64])
    # A gradient with stride 0 everywhere, as that of a sum.
    assert_close(
        torch.autograd.grad(out.sum(), packed)[0],
        torch.autograd.grad(expected.sum(), packed64)[0],
        DTYPE,
        "gradient of the sum",
    )


@pytest.mark.parametrize("length", [12, 40])
def test_no_gradient_flows_from_a_position_to_later_inputs(length: int) -> None:
    q, k, v = (randn(1, 1, length, 16, seed=i).requires_grad_() for i in range(3))
    out = kernels.causal_attention(q, k, v, backend="triton")
    for t in range(0, length, 5):
        dq, dk, dv = torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True)
        assert (dk[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, : t + 1] != 0).all()
        assert (dq[:, :, t + 1 :] == 0).all()
        assert (dq[:, :, :t] == 0).all()


def test_attention_survives_large_scores() -> None:
    q, k, v = (among_nan(randn(1, 1, 40, 16, seed=i) * s) for i, s in enumerate((100, 100, 1)))
    out = kernels.causal_attention(q, k, v, backend="triton")
    assert_close(out, kernels.causal_attention(*fp64(q, k, v), backend="matmul"), DTYPE, "out")
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_attention_of_inputs_with_any_strides() -> None:
    """Expanded along any dimension, turned around, beginning at an odd address."""
    shape = 2, 2, 20, 16
    odd = randn(1 + 2 * 2 * 20 * 16)[1:].view(shape)
    views = [
        randn(1, 1, 20, 16).expand(shape), randn(2, 2, 1, 1).expand(shape), odd,
        randn(2, 20, 16, 2).permute(0, 3, 1, 2), randn(2, 2, 16, 20).transpose(2, 3),
    ]  # fmt: skip
    for i in range(len(views)):
        check_attention(*((views + views)[i + j].detach().requires_grad_() for j in range(3)))
