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
from tinylm.model import Transformer

_C = pytest.importorskip("tinylm._C")
compiled = pytest.importorskip("tinylm.kernels.compiled")

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("z_loss", "with_bias"), [(0.0, True), (1e-2, False)])
def test_linear_cross_entropy(
    z_loss: float, with_bias: bool, reduction: str, dtype: torch.dtype
) -> None:
    h, weight, bias = randn(300, 24), randn(101, 24, seed=1) / 3, randn(101, seed=2)
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


# --- how they are chosen -------------------------------------------------------------------------

only_once = pytest.mark.parametrize("variant", _C.instruction_sets()[-1:], indirect=True)


def _calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = randn(5, 8, dtype=torch.float32).requires_grad_()
    yield compiled.exponentials_, (x.detach(),)
    yield compiled.swiglu, (x,)
    yield compiled.swiglu_backward, (x.detach(), randn(5, 4, dtype=torch.float32))
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
        lambda: compiled.swiglu(x[:, :7]),
        lambda: compiled.swiglu_backward(x, x),
        lambda: compiled.swiglu_backward(x, x[:, :4].bfloat16()),
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
        results.append([out, *torch.autograd.grad(out.float().sum(), (x, w))])
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
