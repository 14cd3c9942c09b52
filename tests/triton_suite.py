"""The Triton kernels against fp64 references: outputs, gradients, odd shapes, repeats.

`test_triton_kernels.py` runs this file in a process of its own: in Triton's interpreter, which has
to be chosen before the kernels are imported, and on a GPU where there is one.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.kernels import dispatch
from tinylm.kernels.triton.common import dense_last
from tinylm.model import Transformer

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
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*eterministic"),
    pytest.mark.filterwarnings("ignore:Conversion of an array"),  # interpreter of Triton 3.6
]


@pytest.fixture(autouse=True)
def _poisoned_and_never_falling_back(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
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


def check_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    out = kernels.causal_attention(q, k, v, backend="triton", **options)
    qkv64 = fp64(q, k, v)
    expected = kernels.causal_attention(*qkv64, backend="matmul", **options)
    assert out.dtype == q.dtype
    assert_close(out, expected, q.dtype, "out")
    again = kernels.causal_attention(q, k, v, backend="triton", **options)
    assert torch.equal(out, again)
    assert_same_gradients(out, [q, k, v], expected, qkv64)


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


def starts(length: int, *documents: int) -> Tensor:
    """start_BT of two sequences: documents of these lengths, and the same turned around."""
    rows = []
    for lengths in (documents, documents[::-1]):
        places = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
        rows.append(places[:length])
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


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


@pytest.mark.parametrize("length", [9, 70])
def test_attention_with_fewer_key_heads(length: int) -> None:
    q = among_nan(randn(2, 6, length, 16))
    k, v = (among_nan(randn(2, 2, length, 16, seed=i)) for i in (1, 2))
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [*((n, 128) for n in LENGTHS), (33, 1), (100, 31)])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(rms: bool, residual: bool, width: int, rows: int, dtype: torch.dtype) -> None:
    x, other = (among_nan(randn(rows, width, dtype=dtype, seed=i)) for i in range(2))
    # Master weights in fp32.
    weight, bias = (among_nan(randn(width, dtype=torch.float32, seed=i)) for i in (2, 3))
    options = {"residual": other} if residual else {}
    # The kernel normalises the sum as it is stored; so must the reference.
    total = (x + other).detach() if residual else x
    inputs64 = fp64(total, weight, *([] if rms else [bias]))
    if rms:
        result = kernels.rms_norm(x, weight, backend="triton", **options)
        expected = kernels.rms_norm(*inputs64)
    else:
        result = kernels.layer_norm(x, weight, bias, backend="triton", **options)
        expected = kernels.layer_norm(*inputs64, backend="reference")
    out, summed = result if residual else (result, x)
    assert torch.equal(summed, total)
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    inputs = [x, weight] + ([] if rms else [bias])
    both, both64 = out, expected
    if residual:  # a gradient arrives through the sum too
        both, both64 = torch.stack((out, summed)), torch.stack((expected, inputs64[0]))
    if width == 1 and not rms:
        return  # the gradient is 0 and only rounding is left
    weights = randn(*both.shape, seed=99).to(dtype)
    actual = torch.autograd.grad(both, inputs, weights, retain_graph=True)
    again = torch.autograd.grad(both, inputs, weights, retain_graph=True)
    wanted = torch.autograd.grad(both64, inputs64, weights.double())
    for i, (a, b, w) in enumerate(zip(actual, again, wanted, strict=True)):
        assert torch.equal(a, b)
        assert_close(a, w, dtype, f"gradient {i}")
    if residual:
        assert torch.equal(torch.autograd.grad(both, [other], weights)[0], actual[0])


def test_norm_of_head_vectors_and_of_one_row() -> None:
    """What QK-norm passes (a transposed view), and a single vector."""
    x = randn(2, 5, 6, 16)[:, :, 1:3].transpose(1, 2).requires_grad_()
    weight = randn(16, seed=1).requires_grad_()
    inputs64 = fp64(x, weight)
    out = kernels.rms_norm(x, weight, backend="triton")
    expected = kernels.rms_norm(*inputs64)
    assert_close(out, expected, DTYPE, "out")
    assert_same_gradients(out, [x, weight], expected, inputs64)
    one = kernels.rms_norm(x[0, 0, 0], weight, backend="triton")
    assert_close(one, expected[0, 0, 0], DTYPE, "one row")


def test_norm_of_heads_scaled_apart() -> None:
    """What QK-norm passes for queries and keys together."""
    x = randn(2, 5, 6, 16)[:, :, 1:4].requires_grad_()
    weight = randn(3, 16, seed=1).requires_grad_()
    inputs64 = fp64(x, weight)
    out = kernels.rms_norm(x, weight, backend="triton")
    expected = kernels.rms_norm(*inputs64)
    assert_close(out, expected, DTYPE, "out")
    assert_same_gradients(out, [x, weight], expected, inputs64)


def test_norm_of_mixed_dtypes() -> None:
    x, other = randn(9, 32, dtype=torch.float16), randn(9, 32, dtype=torch.float32, seed=1)
    weight = randn(32, seed=2)
    out, total = kernels.rms_norm(x, weight, residual=other, backend="triton")
    assert out.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + other)
    assert_close(out, kernels.rms_norm(total.double(), weight.double()), torch.float32, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", LENGTHS)
def test_linear_cross_entropy(rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    h = among_nan(randn(rows, 24, seed=1).div(4).to(dtype))
    weight = among_nan(randn(97, 24, dtype=dtype, seed=2))
    bias = among_nan(randn(97, dtype=dtype, seed=3)) if with_bias else None
    targets = (torch.arange(rows) * 7 % 97).to(DEVICE)
    targets[1::5] = -100
    inputs = [h, weight] + ([] if bias is None else [bias])
    inputs64 = fp64(*inputs)
    expected = F.cross_entropy(F.linear(*inputs64), targets) * 1000  # as if by a loss scale
    loss = kernels.linear_cross_entropy(h, weight, targets, bias_V=bias, backend="triton") * 1000
    assert loss.dtype == torch.float32
    assert_close(loss, expected, dtype, "loss")
    actual = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs64)
    for i, (a, b, w) in enumerate(zip(actual, again, wanted, strict=True)):
        assert torch.equal(a, b)
        assert a.dtype == dtype
        assert_close(a, w, dtype, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("softcap", "z_loss"), [(3.0, 0.0), (None, 0.1), (3.0, 0.1)])
def test_linear_cross_entropy_with_more_terms(
    softcap: float | None, z_loss: float, reduction: str, dtype: torch.dtype
) -> None:
    """Logits of about 5, so that a cap of 3 bends them; each row has a gradient of its own."""
    h, weight = among_nan(randn(45, 24, dtype=dtype)), among_nan(randn(70, 24, dtype=dtype, seed=1))
    bias = among_nan(randn(70, seed=2))
    targets = (torch.arange(45) * 7 % 70).to(DEVICE)
    targets[1::5] = 3
    options: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "reduction": reduction}
    options["ignore_index"] = 3
    inputs, inputs64 = [h, weight, bias], fp64(h, weight, bias)
    cross_entropy = kernels.linear_cross_entropy
    loss = cross_entropy(h, weight, targets, bias_V=bias, backend="triton", **options)
    options["bias_V"] = inputs64[2]
    expected = cross_entropy(*inputs64[:2], targets, backend="reference", **options)
    assert_close(loss, expected, dtype, "loss")
    assert (loss[1::5] == 0).all() if reduction == "none" else loss.dim() == 0
    assert_same_gradients(loss, inputs, expected, inputs64)


def test_linear_cross_entropy_without_a_loss_scale_does_not_underflow() -> None:
    """A probability over a million rows is 0 in fp16."""
    h = randn(100, 16, dtype=torch.float16)
    weight = randn(97, 16, dtype=torch.float32, seed=1).requires_grad_()
    targets = torch.arange(100, device=DEVICE) % 97
    h64, weight64 = fp64(h, weight)
    loss = kernels.linear_cross_entropy(h, weight, targets, backend="triton")
    (dweight,) = torch.autograd.grad(loss / 1e6, weight)
    (wanted,) = torch.autograd.grad(F.cross_entropy(h64 @ weight64.T, targets), weight64)
    assert dweight.dtype == torch.float32
    assert_close(dweight * 1e6, wanted, torch.float16, "dweight")


def test_linear_cross_entropy_of_what_counts_nowhere_and_of_targets_out_of_range() -> None:
    h, weight = randn(5, 16).requires_grad_(), randn(20, 16, seed=1).requires_grad_()

    def loss(*targets: int, dtype: torch.dtype = torch.int64) -> Tensor:
        ids = torch.tensor(targets, device=DEVICE, dtype=dtype)
        return kernels.linear_cross_entropy(h, weight, ids, backend="triton", ignore_index=7)

    nothing = loss(7, 7, 7, 7, 7)
    assert nothing.isnan()  # as in torch: a mean over nothing, whose gradient is 0
    for gradient in torch.autograd.grad(nothing, (h, weight)):
        assert (gradient == 0).all()
    assert torch.equal(loss(1, 2, 3, 4, 5), loss(1, 2, 3, 4, 5, dtype=torch.int32))
    assert loss(1, 2, 3, 4, 20).isnan()
    assert loss(1, 2, 3, 4, -1).isnan()
    for gradient in torch.autograd.grad(loss(7, 1, 7, 7, 2), (h, weight)):
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


def test_norms_of_inputs_with_any_strides() -> None:
    weight = randn(1, seed=1).expand(32).detach().requires_grad_()
    views = randn(1, 32).expand(9, 32), randn(9, 1).expand(9, 32), randn(32, 9).T
    for x, residual in zip(views, (None, views[2], views[0]), strict=True):
        inputs = [x.detach().requires_grad_(), weight]
        result = kernels.rms_norm(*inputs, residual=residual, backend="triton")
        out = result if residual is None else result[0]
        inputs64 = fp64(*inputs)
        total = inputs64[0] if residual is None else inputs64[0] + residual
        expected = kernels.rms_norm(total, inputs64[1])
        assert_close(out, expected, DTYPE, "out")
        assert_same_gradients(out, inputs, expected, inputs64)


def test_linear_cross_entropy_of_inputs_with_any_strides() -> None:
    targets = torch.arange(22, device=DEVICE)[::2]
    for h, weight in (
        (randn(1, 16).expand(11, 16), randn(16, 30).T),
        (randn(16, 11).T, randn(30, 1).expand(30, 16)),
    ):
        inputs = [h.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = kernels.linear_cross_entropy(*inputs, targets, backend="triton")
        inputs64 = fp64(*inputs)
        expected = F.cross_entropy(F.linear(*inputs64), targets)
        assert_same_gradients(loss, inputs, expected, inputs64)


def test_empty_inputs_give_what_the_references_give(caplog: pytest.LogCaptureFixture) -> None:
    nothing = torch.zeros(0, dtype=torch.long, device=DEVICE)
    loss = kernels.linear_cross_entropy(randn(0, 16), randn(9, 16), nothing, backend="triton")
    assert loss.isnan()
    for shape in ((0, 2, 5, 16), (2, 2, 0, 16)):
        x = randn(*shape).requires_grad_()
        out = kernels.causal_attention(x, x, x, backend="triton")
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape
    assert kernels.layer_norm(randn(3, 0, 16), randn(16), backend="triton").shape == (3, 0, 16)
    assert len(caplog.records) == 3
    assert all("empty input" in record.getMessage() for record in caplog.records)
    caplog.clear()


def test_operators_under_autocast() -> None:
    """Products in its dtype, results and gradients as torch gives them."""
    h, weight = (randn(n, 32, dtype=torch.float32).requires_grad_() for n in (40, 97))
    targets = torch.arange(40, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        loss = kernels.linear_cross_entropy(h, weight, targets, backend="triton")
        out = kernels.causal_attention(*[h.view(1, 1, 40, 32)] * 3, backend="triton")
        norm = kernels.layer_norm(h, weight[0], backend="triton")
    assert (loss.dtype, out.dtype, norm.dtype) == (torch.float32, torch.float16, torch.float32)
    h64, weight64 = fp64(h, weight)
    expected = F.cross_entropy(h64 @ weight64.T, targets)
    assert_close(loss, expected, torch.float16, "loss")
    wanted = torch.autograd.grad(expected, (h64, weight64))
    for i, gradient in enumerate(torch.autograd.grad(loss, (h, weight))):
        assert gradient.dtype == torch.float32
        assert_close(gradient, wanted[i], torch.float16, f"gradient {i}")
    (dh,) = torch.autograd.grad(out.sum(), h)
    assert dh.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_nothing_quadratic_is_held_in_memory() -> None:
    """Neither T × S scores nor N × V logits, forwards or backwards: no more than the inputs."""
    q, k, v = (randn(1, 1, 100, 16, seed=i).requires_grad_() for i in range(3))
    h, weight = randn(90, 16).requires_grad_(), randn(97, 16, seed=1).requires_grad_()
    targets = torch.arange(90, device=DEVICE)
    with Largest() as largest:
        out = kernels.causal_attention(q, k, v, backend="triton")
        torch.autograd.grad(out, (q, k, v), out.detach())
    assert q.numel() <= largest.elements < 100 * 100
    with Largest() as largest:
        for reduction in ("mean", "none"):
            loss = kernels.linear_cross_entropy(
                h, weight, targets, reduction=reduction, backend="triton"
            )
            torch.autograd.grad(loss.sum(), (h, weight))
    assert weight.numel() <= largest.elements < 90 * 97


def test_gradients_of_some_inputs_only() -> None:
    h, weight = randn(9, 16), randn(20, 16, seed=1)
    targets = torch.arange(9, device=DEVICE)
    for chosen in (h, weight):
        chosen.requires_grad_()
        kernels.linear_cross_entropy(h, weight, targets, backend="triton").backward()
        assert chosen.grad is not None
        chosen.requires_grad_(False)
    q, k, v = (randn(1, 1, 9, 16, seed=i) for i in range(3))
    kernels.causal_attention(q, k.requires_grad_(), v, backend="triton").sum().backward()
    assert k.grad is not None
    assert q.grad is None


def test_gradients_of_gradients_are_refused() -> None:
    """Not wrong in silence."""
    x, weight, targets = randn(1, 1, 9, 16), randn(16, seed=1), torch.arange(9, device=DEVICE)
    calls = [
        lambda x: kernels.causal_attention(x, x, x, backend="triton"),
        lambda x: kernels.rms_norm(x, weight, backend="triton"),
        lambda x: kernels.layer_norm(x, weight, backend="triton"),
        lambda x: kernels.linear_cross_entropy(x[0, 0], x[0, 0], targets, backend="triton"),
        lambda x: kernels.linear_cross_entropy(
            x[0, 0], weight.expand(9, 16), targets, backend="triton"
        ),
    ]
    for call in calls:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="autograd|twice"):
            gradient.square().sum().backward()


def _operator_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    from tinylm.kernels.triton import attention, linear_cross_entropy, norm

    q, k, v = (randn(1, 2, 5, 16, seed=i).requires_grad_() for i in range(3))
    dout = randn(1, 5, 2, 16)
    for start in (None, torch.tensor([[0, 0, 0, 3, 3]], device=DEVICE)):
        out, lse = attention.attention_forward(q, k, v, start, 0.25, True)
        yield attention.attention_forward, (q, k, v, start, 0.25, True)
        plain = [x.detach() for x in (q, k, v)]
        saved = *plain, start, out.detach(), lse.detach()
        yield attention.attention_backward, (dout, *saved, 0.25, True)
    x, r = (randn(5, 16, seed=i).requires_grad_() for i in range(2))
    w, b = (randn(16, seed=i).requires_grad_() for i in (2, 3))
    for residual, bias, rms in itertools.product((None, r), (None, b), (False, True)):
        if not (rms and bias is not None):
            yield norm.norm_forward, (x, residual, w, bias, 1e-5, rms)
    _, _, mean, rstd = (t.detach() for t in norm.norm_forward(x, None, w, b, 1e-5, False))
    plain = tuple(t.detach() for t in (x, w))
    yield norm.norm_backward, (randn(5, 16), None, *plain, mean, rstd, False)
    head, bias_v = randn(7, 16).requires_grad_(), randn(7).requires_grad_()
    targets = torch.tensor([0, 3, -100, 6, 1], device=DEVICE)
    call = (x, head, bias_v, targets, -100, 5.0, 1e-3, DTYPE, True)
    yield linear_cross_entropy.linear_cross_entropy_forward, call
    _, lse, _ = (t.detach() for t in linear_cross_entropy.linear_cross_entropy_forward(*call))
    detached = tuple(t.detach() for t in (x, head, bias_v))
    yield (
        linear_cross_entropy.linear_cross_entropy_backward_weight,
        (torch.ones(5, device=DEVICE), *detached, targets, lse, -100, 5.0, 1e-3, DTYPE),
    )


def test_operators_are_registered_as_torch_wants_them() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what is never written, too
    light = ("test_schema", "test_autograd_registration", "test_faketensor")
    seen = set()
    for operator, arguments in _operator_calls():
        # Dynamic shapes take opcheck's time: in the first call of each operator only.
        tests = (*light, "test_aot_dispatch_dynamic") if operator not in seen else light
        torch.library.opcheck(operator, arguments, test_utils=tests)
        seen.add(operator)


def _tiny_model(preset: str) -> tuple[Transformer, Tensor, Tensor]:
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "n_heads": 2, "d_ff": 48}
    if preset == "modern":
        sizes |= {"n_layers": 2, "n_kv_heads": 1}
    config = replace(TrainConfig.from_preset(preset).model, max_seq_len=16, **sizes)
    ids = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return Transformer(config).to(DEVICE), ids[:, :-1], ids[:, 1:]


def _train(preset: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], Any]:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, setting)
    dispatch.select.cache_clear()
    torch.use_deterministic_algorithms(False)
    model, ids, targets = _tiny_model(preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        with torch.autocast(DEVICE, torch.float16, enabled=ONLY_FP16 and setting == "triton"):
            loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dispatch.select.cache_clear()
    return losses, model.state_dict()


@pytest.mark.parametrize("setting", ["triton", "torch"])
@pytest.mark.parametrize("preset", ["modern", "causal", "notebook"])
def test_training_equals_training_on_the_references(
    preset: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights = _train(preset, setting, monkeypatch)
    wanted_losses, wanted_weights = _train(preset, "reference", monkeypatch)
    assert losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(wanted_losses, rel=TOLERANCE[DTYPE])
    for name, weight in weights.items():
        assert_close(weight, wanted_weights[name].double(), DTYPE, name)


def test_refused_calls_run_in_torch_and_say_why_once(caplog: pytest.LogCaptureFixture) -> None:
    q = randn(1, 1, 4, 256, dtype=torch.float16)
    with caplog.at_level(logging.WARNING, "tinylm"):
        for _ in range(2):
            out = kernels.causal_attention(q, q, q, backend="triton")
    assert torch.equal(out, kernels.causal_attention(q, q, q, backend=_torch_attention()))
    (record,) = caplog.records
    assert "head dimension 256 is above 128 (torch.float16)" in record.getMessage()
    assert kernels.rms_norm(randn(0, 16), randn(16), backend="triton").shape == (0, 16)
    x = randn(4, 16).double()
    assert kernels.layer_norm(x, x[0], backend="triton").dtype == torch.float64
    ones = torch.zeros(4, dtype=torch.long, device=DEVICE)
    kernels.linear_cross_entropy(randn(4, 300), randn(9, 300), ones, backend="triton")
    assert len(caplog.records) == 4
    caplog.clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_operators_can_be_captured_in_a_cuda_graph() -> None:
    """Nothing in them waits for the GPU, or decides by what is on it."""
    x = randn(2, 2, 5, 16).requires_grad_()
    weight, head = randn(16, seed=1).requires_grad_(), randn(9, 16, seed=2).requires_grad_()
    targets = torch.arange(20, device=DEVICE) % 9
    start = torch.tensor([[0, 0, 2, 2, 2]], device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        h = kernels.rms_norm(x, weight, backend="triton")
        h = kernels.layer_norm(h, weight, residual=x, backend="triton")[0]
        h = kernels.causal_attention(h, h, h, start_BT=start, backend="triton")
        loss = kernels.linear_cross_entropy(h.reshape(20, 16), head, targets, backend="triton")
        return torch.autograd.grad(loss, (x, weight, head))

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for gradient in captured:
        gradient.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_doctor_checks_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.kernels import check

    monkeypatch.setattr(check, "SECONDS", 0)
    if DEVICE == "cpu":
        monkeypatch.setattr(check, "dtypes", lambda *_: [torch.float16])
    torch.use_deterministic_algorithms(False)
    results = list(check.check(torch.device(DEVICE)))
    assert all(result.ok for result in results), [str(r) for r in results if not r.ok]
    ran = {r.operator for r in results if r.implementation == "triton" and not r.refusal}
    assert ran == {n for n, names in dispatch.IMPLEMENTATIONS.items() if "triton" in names}


def _torch_attention() -> str:
    return "matmul" if DEVICE == "cpu" else "sdpa"


def test_operators_compile_without_a_break() -> None:
    x = randn(2, 2, 5, 16).requires_grad_()
    weight, head = randn(16, seed=1).requires_grad_(), randn(9, 16, seed=2).requires_grad_()
    targets = torch.arange(20, device=DEVICE) % 9

    def step(x: Tensor, weight: Tensor, head: Tensor) -> Tensor:
        h = kernels.rms_norm(x, weight, backend="triton")
        h = kernels.layer_norm(h, weight, residual=x, backend="triton")[0]
        h = kernels.causal_attention(h, h, h, backend="triton")
        return kernels.linear_cross_entropy(h.reshape(20, 16), head, targets, backend="triton")

    inputs = x, weight, head
    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(a, b)
