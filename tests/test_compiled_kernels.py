"""The C++ kernels of a training step, in each variant, against float64 references."""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import TOLERANCE, assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.errors import InputError
from tinylm.kernels import dispatch
from tinylm.kernels.muon import Matrix, MuonOptions
from tinylm.model import Transformer

_C = pytest.importorskip("tinylm._C")
compiled = pytest.importorskip("tinylm.kernels.compiled")
layers = pytest.importorskip("tinylm.kernels.compiled_feed_forward")

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 31, 33, 63, 100]
INFINITY = float("inf")


@pytest.fixture(params=_C.instruction_sets(), autouse=True)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(_C.instruction_sets()[-1])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN until they are written; TINYLM_KERNELS is what it is by default."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.forget()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    dispatch.forget()


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def check(run: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Outputs and gradients of ``run`` are those of ``reference`` in float64."""
    dtype = inputs[0].dtype
    inputs64 = wide(*inputs)
    out, expected = run(*inputs), reference(*inputs64)
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs64), strict=True)
    for i, (actual, wanted) in enumerate(pairs):
        assert_close(actual, wanted, dtype, f"gradient {i}", floor=1.0)


# --- attention -----------------------------------------------------------------------------------


def attention(*qkv: Tensor, **options: Any) -> Tensor:
    return kernels.causal_attention(*qkv, backend="c++", **options)


def plain_attention(*qkv: Tensor, **options: Any) -> Tensor:
    return kernels.causal_attention(*qkv, backend="matmul", **options)


def heads(*shape: int) -> list[Tensor]:
    return [randn(*shape, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3)]


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


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LENGTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (3 * randn(rows, 2 * width)).to(dtype).requires_grad_()
    check(
        lambda x: kernels.swiglu(x, backend="c++"),
        lambda x: kernels.swiglu(x, backend="torch"),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_what_is_large_or_not_finite(dtype: torch.dtype) -> None:
    gate = torch.tensor([-INFINITY, -1e30, -200.0, -90.0, -0.0, 90.0, 1e30, INFINITY, float("nan")])
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype).requires_grad_()
    results = []
    for backend in ("c++", "torch"):
        out = kernels.swiglu(x, backend=backend)
        results += [out, torch.autograd.grad(out.sum(), x)[0]]
    torch.testing.assert_close(results[0], results[2], equal_nan=True, rtol=1e-2, atol=1e-30)
    torch.testing.assert_close(
        results[1][:, :9], results[3][:, :9], equal_nan=True, rtol=1e-2, atol=1e-30
    )


def test_swiglu_of_any_strides_and_of_nothing() -> None:
    x = randn(6, 4, 10, dtype=torch.float32).transpose(0, 1)[:, ::2].requires_grad_()
    check(lambda x: kernels.swiglu(x, backend="c++"), lambda x: kernels.swiglu(x), x)
    assert kernels.swiglu(torch.zeros(0, 6), backend="c++").shape == (0, 3)
    assert kernels.swiglu(torch.zeros(3, 0), backend="c++").shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(1, 2), (31, 6), (33, 32), (63, 64), (100, 18)])
def test_norm_and_rotary(length: int, head_dim: int, dtype: torch.dtype) -> None:
    packed = randn(2, length, 4, head_dim, dtype=dtype).requires_grad_()
    weight = randn(3, head_dim, dtype=torch.float32, seed=1).requires_grad_()
    tables = kernels.rotary_tables(length, head_dim, 10_000.0)

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda x, w: kernels.norm_rotary(x[:, :, :3], w, *tables, backend=backend)

    check(run("c++"), run("separate"), packed, weight)


@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_row_that_is_not_finite_spoils_no_other(value: float) -> None:
    x = randn(1, 3, 1, 34, dtype=torch.float32)
    x[0, 1, 0, 5] = value
    tables = kernels.rotary_tables(3, 34, 10.0)
    out = kernels.norm_rotary(x, torch.ones(1, 34), *tables, backend="c++")
    assert out[:, ::2].isfinite().all()
    assert out[:, 1].isnan().any()


NORMS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]


@pytest.mark.parametrize(("dtype", "out_dtype"), NORMS)
@pytest.mark.parametrize("width", LENGTHS)
@pytest.mark.parametrize("rows", [1, 130])
def test_rms_norm(
    rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    x = (3 * randn(rows, width)).to(dtype).requires_grad_()
    weight = randn(width, dtype=torch.float32, seed=1).requires_grad_()
    out = kernels.rms_norm(x, weight, dtype=out_dtype, backend="c++")
    assert out.dtype == out_dtype
    inputs64 = wide(x, weight)
    expected = kernels.rms_norm(*inputs64, backend="reference")
    assert_close(out, expected, out_dtype)
    dout = randn(rows, width, dtype=out_dtype, seed=2)
    actual = torch.autograd.grad(out, (x, weight), dout)
    assert [g.dtype for g in actual] == [dtype, torch.float32]
    wanted = torch.autograd.grad(expected, inputs64, dout.double())
    for got, right in zip(actual, wanted, strict=True):
        assert_close(got, right, dtype, floor=1.0)
    assert not caplog.records


def test_rms_norm_of_any_strides_and_with_what_it_leaves_to_torch() -> None:
    x = randn(6, 4, 10, dtype=torch.float32).transpose(0, 1)[:, ::2].requires_grad_()
    weight = randn(10, dtype=torch.float32)
    check(
        lambda x: kernels.rms_norm(x, weight, backend="c++"),
        lambda x: kernels.rms_norm(x, weight.double(), backend="reference"),
        x,
    )
    wider = kernels.rms_norm(x, weight, dtype=torch.float64, backend="c++")
    assert_close(wider, kernels.rms_norm(x, weight).double(), torch.float32)
    assert kernels.rms_norm(torch.zeros(0, 10), weight, backend="c++").shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [*LENGTHS, 1000])
def test_exponentials(columns: int, dtype: torch.dtype) -> None:
    x = (5 * randn(4, columns)).to(dtype)
    x[1] += 300
    x[2, 1:] = -INFINITY
    expected = (x.double() - x.double().amax(1, keepdim=True)).exp()
    top, sums = compiled.exponentials_(y := x.clone())
    assert torch.equal(top, x.float().amax(1))
    assert_close(y, expected, dtype)
    assert_close(sums, expected.sum(1), torch.float32)


def test_exponentials_of_what_is_not_finite() -> None:
    x = torch.zeros(4, 40)
    x[0, 3], x[1, 3], x[2] = float("nan"), INFINITY, -INFINITY
    _, sums = compiled.exponentials_(x)
    assert sums.isnan().tolist() == [True, True, True, False]


# --- cross-entropy -------------------------------------------------------------------------------


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies whole matrices runs in every variant, however slow."""
    monkeypatch.setattr(compiled, "products_refusal", lambda: None)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("z_loss", "with_bias"), [(0.0, True), (1e-2, False)])
@pytest.mark.parametrize("width", [24, 32])
def test_linear_cross_entropy(
    width: int, z_loss: float, with_bias: bool, reduction: str, dtype: torch.dtype
) -> None:
    h, weight, bias = randn(300, width), randn(101, width, seed=1) / 3, randn(101, seed=2)
    targets = torch.arange(300) % 101
    targets[::7] = -100
    inputs = [x.to(dtype).requires_grad_() for x in (h, weight, bias)[: 2 + with_bias]]

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda h, w, b=None: kernels.linear_cross_entropy(
            h, w, targets, z_loss=z_loss, bias_V=b, reduction=reduction, backend=backend
        )

    inputs64 = wide(*inputs)
    losses = run("c++")(*inputs), run("reference")(*inputs64)
    assert losses[0].dtype == torch.float32
    assert_close(*losses, dtype, "loss")
    pairs = zip(gradients(losses[0], *inputs), gradients(losses[1], *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient")


def head_and_reference(
    N: int, C: int, V: int, with_bias: bool, z_loss: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(loss_N, dh, dweight and perhaps dbias), of C++ and in fp64 of the same rounded weights."""
    h, weight = randn(N, C, dtype=torch.bfloat16), randn(V, C, dtype=torch.float32, seed=1) / C**0.5
    bias = randn(V, dtype=torch.float32, seed=2) if with_bias else None
    targets, counts = (3 * torch.arange(N) + 2) % V, randn(N, dtype=torch.float32, seed=3)
    targets[5::7] = -1
    *actual, right = compiled.head_cross_entropy(h, weight, bias, targets, counts, -1, z_loss)
    assert right
    inputs = wide(*(x for x in (h, weight.bfloat16(), bias) if x is not None))
    loss_N = kernels.linear_cross_entropy(
        *inputs[:2], targets, -1, z_loss=z_loss, bias_V=inputs[2] if with_bias else None,
        reduction="none", backend="reference",
    )  # fmt: skip
    expected = torch.autograd.grad((loss_N * counts).sum(), inputs)
    return tuple(actual[: 3 + with_bias]), (loss_N.detach(), *expected)


@pytest.mark.parametrize("rows", [*LENGTHS, 300, 600])
@pytest.mark.parametrize(("width", "vocabulary"), [(32, 1), (96, 33), (32, 1023), (64, 2100)])
def test_head_cross_entropy(rows: int, width: int, vocabulary: int) -> None:
    """Parts of a chunk of rows, of a block of tokens, of a tile; one token that is certain."""
    for with_bias, z_loss in ((False, 0.0), (True, 1e-2)):
        actual, expected = head_and_reference(rows, width, vocabulary, with_bias, z_loss)
        # The difference of two numbers whose size is that of logits.
        assert_close(actual[0], expected[0], torch.float32, "loss", floor=1.0)
        assert (actual[0] >= 0).all()
        for got, wanted, name in zip(actual[1:], expected[1:], ("dh", "dw", "db"), strict=False):
            assert_close(got, wanted, torch.bfloat16, name, floor=1e-2)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("width", [24, 32])
def test_gradients_may_be_asked_for_again_and_scaled(width: int) -> None:
    """They are found with the loss, and handed on as they are where nothing scales them."""
    h = randn(40, width, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, width, dtype=torch.float32, seed=1).requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++")
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (h, weight), retain_graph=True)
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++")
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert h.grad is not None
    assert weight.grad is not None
    for grad, once in zip((h.grad, weight.grad), kept, strict=True):
        assert torch.equal(grad, 2 * once)
    for scaled, once in zip(torch.autograd.grad(3 * loss, (h, weight)), kept, strict=True):
        assert_close(scaled, 3 * once.double(), torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.sampled_from([32, 64]), st.integers(1, 140), st.booleans())
def test_head_cross_entropy_of_any_size(N: int, C: int, V: int, with_bias: bool) -> None:
    actual, expected = head_and_reference(N, C, V, with_bias, 0.0)
    assert_close(actual[0], expected[0], torch.float32, "loss", floor=1.0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_close(got, wanted, torch.bfloat16, floor=1e-2)


def test_a_certain_token_leaves_no_gradient() -> None:
    """Where its probability is 1 but for 1e-8, rounding of its exponential must not show."""
    h, weight = torch.ones(40, 32, dtype=torch.bfloat16), torch.zeros(50, 32)
    weight[7] = 0.75
    targets = torch.full((40,), 7)
    loss, dh, dweight, _, right = compiled.head_cross_entropy(h, weight, None, targets, None, -1, 0)
    assert right
    expected = torch.tensor(24.0).neg().exp().mul(49).log1p()
    assert_close(loss, expected.double().expand(40), torch.float32, floor=1.0)
    rounding = 24 * 2**-24  # of the exponential of 24 in fp32
    assert dh.abs().max() < rounding
    assert dweight.abs().max() < 40 * rounding


@pytest.mark.parametrize("value", [200.0, -200.0, float("nan"), INFINITY])
def test_logits_beyond_its_range_are_left_to_another_pass(value: float, own_products: None) -> None:
    h, weight = randn(40, 32, dtype=torch.bfloat16), randn(50, 32, dtype=torch.float32, seed=1)
    bias, targets = torch.full((50,), value), torch.arange(40)
    *_, right = compiled.head_cross_entropy(h, weight, bias, targets, None, -100, 0.0)
    assert not right
    inputs = [x.requires_grad_() for x in (h, weight, bias)]

    def run(backend: str, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.linear_cross_entropy(h, w, targets, bias_V=b, backend=backend)

    loss = run("c++", *inputs)
    if abs(value) < INFINITY:
        expected = run("reference", *wide(*inputs))
        assert_close(loss, expected, torch.bfloat16)
        pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(
            run("reference", *(x.float() for x in inputs)), inputs), strict=True)  # fmt: skip
        for actual, wanted in pairs:
            assert_close(actual, wanted, torch.bfloat16)
    else:
        assert loss.isnan()


@pytest.mark.parametrize("target", [50, -1, -101])
def test_a_target_that_is_no_token_is_refused(target: int, own_products: None) -> None:
    h = randn(40, 32, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, 32, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(40)
    targets[33] = target
    with pytest.raises((IndexError, RuntimeError), match=r"outside the vocabulary|out of bounds"):
        kernels.linear_cross_entropy(h, weight, targets, backend="c++")


def test_where_torch_multiplies_faster_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    h = randn(40, 32, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, 32, dtype=torch.bfloat16).requires_grad_()
    calls = []
    whole = compiled.head_cross_entropy
    monkeypatch.setattr(
        compiled, "head_cross_entropy", lambda *inputs: calls.append(1) or whole(*inputs)
    )
    losses = []
    for refusal in (None, "AMX"):
        monkeypatch.setattr(compiled, "products_refusal", lambda refusal=refusal: refusal)
        losses.append(kernels.linear_cross_entropy(h, weight, torch.arange(40), backend="c++"))
    assert len(calls) == 1
    assert_close(losses[1], losses[0].double(), torch.bfloat16)


@pytest.mark.parametrize("size", [1e-3, 30.0, 3000.0])
def test_loss_of_any_size_of_logits(size: float) -> None:
    h, weight = randn(40, 16, dtype=torch.bfloat16) * size, randn(50, 16, dtype=torch.bfloat16)
    h.requires_grad_()
    targets = torch.arange(40)
    results = [
        kernels.linear_cross_entropy(x, w, targets, backend=backend)
        for backend, x, w in (("c++", h, weight), ("reference", *wide(h, weight)))
    ]
    assert_close(*results, torch.bfloat16)
    assert results[0] >= 0


# --- Muon ----------------------------------------------------------------------------------------


def muon_matrices(
    sizes: list[tuple[int, int, int]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Matrix]:
    """Of (rows, columns, stacked), with gradients of some rank and size."""
    matrices = []
    for i, (rows, columns, stacked) in enumerate(sizes):
        weight, momentum = (randn(rows, columns, seed=seed + 2 * i + j) for j in range(2))
        gradient = randn(rows, columns, seed=seed + 100 + i) * 0.01 + 0.02
        tensors = (x.float().to(dtype) for x in (weight, gradient, 0.01 * momentum))
        matrices.append(Matrix(*tensors, stacked))
    return matrices


@pytest.mark.usefixtures("own_products")
def test_muon(caplog: pytest.LogCaptureFixture) -> None:
    """Tall, wide and square ones, stacked or not, against products in fp64, for three steps."""
    sizes = [(32, 32, 1), (192, 64, 3), (64, 192, 1), (128, 32, 2), (32, 96, 1)]
    ours, theirs = muon_matrices(sizes, 0), muon_matrices(sizes, 0, torch.float64)
    options = MuonOptions(lr=0.1, momentum=0.7, weight_decay=0.2, dtype=torch.bfloat16)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            before = b.weight.clone()
            a.gradient.copy_(randn(*a.gradient.shape, seed=step, dtype=torch.float32))
            b.gradient.copy_(a.gradient)
            kernels.muon_step([a], options, backend="c++")
            kernels.muon_step([b], options, backend="torch")
            assert_close(a.momentum, b.momentum, torch.float32, f"momentum {step}")
            change = (b.weight - before).abs().max()
            error = (a.weight.double() - b.weight).abs().max()
            # Five iterations in bf16 add up; a step is thus wrong by at most so much of itself.
            assert error <= (step + 1) * 0.04 * change, f"step {step}: {error / change:.3f}"
    assert not caplog.records


@pytest.mark.usefixtures("own_products")
def test_muon_is_as_exact_as_in_torch() -> None:
    """By the mean error against products in fp64."""
    errors: dict[str, Tensor] = {}
    for backend in ("c++", "torch"):
        matrices = muon_matrices([(96, 64, 1)] * 8, 5)
        exact = muon_matrices([(96, 64, 1)] * 8, 5, torch.float64)
        options = MuonOptions(lr=0.1, dtype=torch.bfloat16)
        kernels.muon_step(matrices, options, backend=backend)
        kernels.muon_step(exact, options, backend="torch")
        pairs = zip(matrices, exact, strict=True)
        errors[backend] = torch.stack([(a.weight - b.weight).square().mean() for a, b in pairs])
    assert errors["c++"].sum() <= 1.2 * errors["torch"].sum()


@pytest.mark.usefixtures("own_products")
def test_muon_of_zeros_and_of_what_is_not_finite() -> None:
    zero, bad, good = muon_matrices([(32, 64, 1)] * 3, 0)
    zero.gradient.zero_()
    zero.momentum.zero_()
    bad.gradient[3, 5] = float("nan")
    before = zero.weight.clone()
    kernels.muon_step([zero, bad, good], MuonOptions(0.1, dtype=torch.bfloat16), backend="c++")
    assert torch.equal(zero.weight, before)
    assert bad.weight.isnan().any()
    assert good.weight.isfinite().all()


@pytest.mark.usefixtures("own_products")
def test_other_matrices_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    bf16 = MuonOptions(0.1, dtype=torch.bfloat16)
    on_device = bf16._replace(found_inf=torch.zeros(()))
    transposed = muon_matrices([(32, 64, 1)], 0)[0]
    transposed = Matrix(transposed.weight.t(), transposed.gradient.t(), transposed.momentum.t())
    calls = [
        (muon_matrices([(31, 32, 1)], 0), bf16, "of 1 matrices of 31 x 32"),
        (muon_matrices([(64, 32, 4)], 0), bf16, "of 4 matrices of 16 x 32"),
        (muon_matrices([(32, 32, 1)], 0), MuonOptions(0.1), "of products in fp32"),
        (muon_matrices([(32, 32, 1)], 0), on_device, "set off without a look"),
        ([transposed], bf16, "row after row"),
    ]
    for matrices, options, reason in calls:
        caplog.clear()
        dispatch.forget()
        before = matrices[0].weight.clone()
        kernels.muon_step(matrices, options, backend="c++")
        assert not torch.equal(matrices[0].weight, before)
        (record,) = caplog.records
        assert record.getMessage().startswith("muon runs as torch, not in C++: of ")
        assert reason in record.getMessage()


# --- feed-forward layer --------------------------------------------------------------------------


def layer_inputs(rows: tuple[int, ...], C: int, F: int) -> list[Tensor]:
    """x, and weights of a norm and two matrices; these exact in bf16."""
    x, norm = randn(*rows, C, dtype=torch.float32), randn(C, dtype=torch.float32, seed=1)
    up = randn(2 * F, C, dtype=torch.bfloat16, seed=2) / C**0.5
    down = randn(C, F, dtype=torch.bfloat16, seed=3) / F**0.5
    return [t.float().requires_grad_() for t in (x, norm, up, down)]


def layer(*inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return kernels.feed_forward(*inputs, backend="c++")


def check_layer(*inputs: Tensor) -> None:
    """As `check`, with the tolerance of products of bf16."""
    inputs64 = wide(*inputs)
    out, expected = layer(*inputs), kernels.feed_forward(*inputs64, backend="separate")
    assert out.dtype == torch.float32
    assert_close(out, expected, torch.bfloat16, "out")
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs64), strict=True)
    for name, (actual, wanted) in zip(("dx", "dnorm", "dup", "ddown"), pairs, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, wanted, torch.bfloat16, name, floor=1.0)


@pytest.mark.parametrize("rows", [*LENGTHS, 128, 129, 300, 1100])
@pytest.mark.parametrize(("C", "F"), [(32, 32), (64, 96), (128, 64)])
def test_feed_forward(
    rows: int, C: int, F: int, own_products: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts of a block of rows, and of the groups whose sums are added up."""
    check_layer(*layer_inputs((rows,), C, F))
    assert not caplog.records


@pytest.mark.usefixtures("own_products")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.sampled_from([32, 64]), st.sampled_from([32, 96]))
def test_feed_forward_of_any_rows(B: int, T: int, C: int, F: int) -> None:
    check_layer(*layer_inputs((B, T), C, F))


def test_feed_forward_of_any_strides(own_products: None) -> None:
    x, *weights = layer_inputs((50, 2), 32, 32)
    check_layer(x.detach().transpose(0, 1).requires_grad_(), *weights)
    up = weights[1].detach().t().contiguous().t().requires_grad_()
    check_layer(x, weights[0], up, weights[2])


@pytest.mark.parametrize("value", [1e4, -1e4, float("nan"), INFINITY])
def test_feed_forward_of_what_is_large_or_not_finite(value: float, own_products: None) -> None:
    """It stays in its row, and is seen; in the sums over rows too."""
    x, *weights = layer_inputs((70,), 32, 32)
    with torch.no_grad():
        x[40, 3] = value
    if abs(value) < INFINITY:
        return check_layer(x, *weights)
    out = layer(x, *weights)
    dx, *sums = gradients(out, x, *weights)
    others = torch.arange(70) != 40
    for rows in (out, dx):
        assert rows[others].isfinite().all()
        assert not rows[40].isfinite().all()
    for total in sums[:2]:
        assert not total.isfinite().all()
    return None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x, n, u, d: (x.double(), n.double(), u.double(), d.double()),
            "products in float64",
        ),
        (lambda x, n, u, d: (x, n, u, d.bfloat16()), "not fp32"),
        (lambda x, n, u, d: (x[:, :24], n[:24], u[:, :24], d[:24]), "widths 24 and 32"),
        (lambda x, n, u, d: (x[:0], n, u, d), "of nothing"),
    ],
)
def test_layers_that_are_not_taken_run_apart(
    change: Callable[..., tuple[Tensor, ...]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = change(*(t.detach() for t in layer_inputs((5,), 32, 32)))
    dispatch.forget()
    out = layer(*inputs)
    assert out.shape == inputs[0].shape
    (record,) = caplog.records
    assert record.getMessage().startswith("feed_forward runs as separate, not in C++: of ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("place", range(4))
def test_weights_of_a_layer_that_do_not_belong_together(place: int) -> None:
    inputs = layer_inputs((5,), 32, 64)
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(InputError, match=r"feed_forward of shape .* they must be"):
        layer(*inputs)


# --- how they are chosen -------------------------------------------------------------------------

only_once = pytest.mark.parametrize("variant", _C.instruction_sets()[-1:], indirect=True)


def _calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = randn(5, 8, dtype=torch.float32).requires_grad_()
    yield compiled.exponentials_, (x.detach(),)
    row, weight = randn(1, 32, dtype=torch.bfloat16), randn(3, 32, dtype=torch.float32)
    head = row, weight, torch.zeros(3), torch.tensor([2]), None, -100, 0.0
    yield compiled.head_cross_entropy, head
    norm = x, torch.ones(8).requires_grad_()
    yield compiled.rms_norm, (*norm, 1e-6, torch.bfloat16)
    plain = [tensor.detach() for tensor in norm]
    out, r = compiled.rms_norm(*plain, 1e-6, torch.bfloat16)
    yield compiled.rms_norm_backward, (*plain, r, out)
    yield compiled.swiglu, (x,)
    yield compiled.swiglu_backward, (x.detach(), randn(5, 4, dtype=torch.float32))
    block = layer_inputs((3,), 32, 32)
    yield layers.feed_forward, (*block, 1e-6)
    plain = [tensor.detach() for tensor in block]
    out, h = layers.feed_forward(*plain, 1e-6)
    yield layers.feed_forward_backward, (*plain, h, out, 1e-6)
    heads_NHD, weight = x.view(5, 2, 4), randn(2, 4, dtype=torch.float32).requires_grad_()
    cos, sin = kernels.rotary_tables(5, 4, 10.0)
    yield compiled.norm_rotary, (heads_NHD, weight, cos, sin, 1e-6)
    plain = heads_NHD.detach(), weight.detach()
    out, r = compiled.norm_rotary(*plain, cos, sin, 1e-6)
    yield compiled.norm_rotary_backward, (*plain, cos, sin, r, out)
    qkv = heads(1, 2, 3, 32)
    yield compiled.causal_heads, (*qkv, 0.2)
    plain = [x.detach() for x in qkv]
    out, lse = compiled.causal_heads(*plain, 0.2)
    yield compiled.causal_heads_backward, (out, *plain, lse, 0.2)


@only_once
def test_operators_are_registered_as_torch_wants_them() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what is never written, too
    for operator, arguments in _calls():
        tests = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(operator, arguments, test_utils=tests)


def tiny_model(n_kv_heads: int | None = None) -> tuple[Transformer, Tensor]:
    config = replace(
        TrainConfig.from_preset("modern").model,
        vocab_size=50, d_model=64, n_layers=2, n_heads=2, n_kv_heads=n_kv_heads, d_ff=48,
        max_seq_len=40,
    )  # fmt: skip
    return Transformer(config), torch.randint(50, (3, 41), generator=torch.Generator())


def train(setting: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, setting)
    dispatch.forget()
    model, ids = tiny_model(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("n_kv_heads", [None, 1])
def test_training_equals_training_on_the_references(
    n_kv_heads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = train("auto", monkeypatch, n_kv_heads=n_kv_heads)
    assert losses[-1] < losses[0] - 0.05
    wanted = train("reference", monkeypatch, n_kv_heads=n_kv_heads)
    assert losses == pytest.approx(wanted, rel=TOLERANCE[torch.bfloat16])


@only_once
def test_operators_refuse_what_does_not_belong_together() -> None:
    x, heads_NHD = torch.ones(3, 8), torch.ones(3, 2, 4)
    cos, sin = kernels.rotary_tables(3, 4, 10.0)
    q = torch.ones(1, 2, 3, 32, dtype=torch.bfloat16)
    bad: list[Callable[[], object]] = [
        lambda: compiled.exponentials_(x.t()),
        lambda: compiled.head_cross_entropy(q[0, 0], x, None, torch.zeros(3).long(), None, 0, 0.0),
        lambda: compiled.head_cross_entropy(x, x, None, torch.zeros(3).long(), None, 0, 0.0),
        lambda: compiled.rms_norm(x, torch.ones(7), 1e-6, torch.float32),
        lambda: compiled.rms_norm_backward(x, torch.ones(8), torch.ones(3), x[:2]),
        lambda: compiled.swiglu(x[:, :7]),
        lambda: compiled.swiglu_backward(x, x),
        lambda: compiled.swiglu_backward(x, x[:, :4].bfloat16()),
        lambda: layers.feed_forward(x, torch.ones(8), torch.ones(64, 8), torch.ones(8, 32), 0.0),
        lambda: layers.feed_forward(*layer_inputs((3,), 32, 32)[:3], torch.ones(32, 64), 0.0),
        lambda: layers.feed_forward_backward(
            *layer_inputs((3,), 32, 32), torch.ones(3, 64), torch.ones(3, 32), 0.0
        ),
        lambda: compiled.norm_rotary(heads_NHD, torch.ones(1, 4), cos, sin, 1e-6),
        lambda: compiled.norm_rotary(heads_NHD, torch.ones(2, 4), cos[:, :2], sin[:, :2], 1e-6),
        lambda: compiled.norm_rotary(heads_NHD, torch.ones(2, 4), cos[:0], sin[:0], 1e-6),
        lambda: kernels.norm_rotary(heads_NHD[None], torch.ones(2, 4), cos[:1], sin[:1]),
        lambda: compiled.causal_heads(q, q[:, :1], q, 1.0),
        lambda: compiled.causal_heads(q, q, q.float(), 1.0),
        lambda: compiled.causal_heads(*[q[..., :16]] * 3, 1.0),
    ]
    for call in bad:
        with pytest.raises(InputError, match="do not belong together"):
            call()


@only_once
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by the compiler itself
def test_a_model_compiles_without_a_break() -> None:
    torch.use_deterministic_algorithms(False)
    model, ids = tiny_model()

    def step(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(ids[:, :-1], ids[:, 1:])

    parameters = list(model.parameters())
    expected = torch.autograd.grad(step(ids), parameters)
    whole = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(whole(ids), parameters), expected, strict=True):
        assert_close(a, b, torch.bfloat16)


@only_once
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = randn(700, 4, 64, dtype=torch.bfloat16), torch.ones(4, 64)
    tables = kernels.rotary_tables(700, 64, 10_000.0)
    results = []
    for threads in (1, 3):
        # Only what the kernels are told: torch's own threads stay as other tests found them.
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
        normed = kernels.norm_rotary(x[None], w, *tables, backend="c++")
        out = attention(*(normed.transpose(1, 2) for _ in range(3)))
        out = kernels.swiglu(out, backend="c++")
        flat = out.transpose(1, 2).flatten(0, 2)
        normed = kernels.rms_norm(flat, w.sum(0)[:32].contiguous(), backend="c++")
        rows = normed.detach()
        head = compiled.head_cross_entropy(
            rows, randn(2500, 32, dtype=torch.float32, seed=1) / 32, torch.zeros(2500),
            torch.arange(len(rows)) % 2500, None, -100, 0.0,
        )  # fmt: skip
        matrices = muon_matrices([(64, 32, 1)] * 5, 0)
        kernels.muon_step(matrices, MuonOptions(0.1, dtype=torch.bfloat16), backend="c++")
        weights = [matrix.weight for matrix in matrices]
        gradients_ = torch.autograd.grad(normed.float().sum(), (x, w))
        block = layer_inputs((1100,), 32, 64)
        changed = layers.feed_forward(*block, 1e-6)[0]
        gradients_ += (changed, *gradients(changed, *block))
        results.append([out, normed, *gradients_, *head, *weights])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@only_once
def test_calls_that_are_not_taken_run_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a rule that doctor shows; they are named where C++ was asked for."""
    selection = dispatch.select("causal_attention", "cpu")
    assert (selection.implementation, selection.reason[-14:]) == ("c++", "; else blocked")
    x = randn(1, 2, 5, 16, dtype=torch.float32)
    expected = kernels.causal_attention(x, x, x, backend="blocked")
    assert torch.equal(kernels.causal_attention(x, x, x), expected)
    assert not caplog.records
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "c++")
    dispatch.forget()
    for _ in range(2):
        kernels.causal_attention(x, x, x)
    (record,) = caplog.records
    assert record.getMessage() == (
        "causal_attention runs as blocked, not in C++: of fp32 on cpu; it takes bf16 on a CPU"
    )


@only_once
def test_without_the_extension_torch_runs_and_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tinylm._C", None)
    monkeypatch.delattr("tinylm._C")
    dispatch.forget()
    for operator, implementations in dispatch.IMPLEMENTATIONS.items():
        selection = dispatch.select(operator, "cpu")
        assert selection.implementation == dispatch.torch_choice(operator, "cpu")[0]
        assert ("does not import" in selection.reason) == ("c++" in implementations)
    with caplog.at_level(logging.WARNING):
        kernels.swiglu(torch.ones(2, 4), backend="c++")
    assert "swiglu runs as torch, not in C++: the compiled extension" in caplog.text


def test_on_a_gpu_torch_runs_instead(caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch.select("swiglu", "cuda").implementation == "torch"
    name = dispatch.implementation("swiglu", torch.device("cuda"), "c++")
    assert name == "torch"
    assert "the C++ kernels need a CPU" in caplog.text
