"""The C++ kernels within torch, and when they are chosen."""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled_kernels import (
    attention,
    heads,
    layer_inputs,
    muon_matrices,
)
from operators import TOLERANCE, assert_close, gradients, randn
from torch import Tensor

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.errors import InputError
from tinylm.kernels import dispatch
from tinylm.kernels.muon import MuonOptions
from tinylm.model import Transformer

_C = pytest.importorskip("tinylm._C")
attention_ops = pytest.importorskip("tinylm.kernels.compiled.attention")
loss_ops = pytest.importorskip("tinylm.kernels.compiled.linear_cross_entropy")
layer_ops = pytest.importorskip("tinylm.kernels.compiled.feed_forward")
projection_ops = pytest.importorskip("tinylm.kernels.compiled.projections")
norm_ops = pytest.importorskip("tinylm.kernels.compiled.norm")
rotary_ops = pytest.importorskip("tinylm.kernels.compiled.rotary")
swiglu_ops = pytest.importorskip("tinylm.kernels.compiled.swiglu")


NORM_LINEAR = torch.ones(3, 32), torch.ones(32), torch.ones(32, 32)
only_once = pytest.mark.parametrize("variant", _C.instruction_sets()[-1:], indirect=True)


def _calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = randn(5, 8, dtype=torch.float32).requires_grad_()
    yield loss_ops.exponentials_, (x.detach(),)
    row, weight = randn(1, 32, dtype=torch.bfloat16), randn(3, 32, dtype=torch.float32)
    head = row, weight, torch.zeros(3), torch.tensor([2]), None, -100, 0.0
    yield loss_ops.head_cross_entropy, head
    norm = x, torch.ones(8).requires_grad_()
    yield norm_ops.rms_norm, (*norm, 1e-6, torch.bfloat16)
    plain = [tensor.detach() for tensor in norm]
    out, r = norm_ops.rms_norm(*plain, 1e-6, torch.bfloat16)
    yield norm_ops.rms_norm_backward, (*plain, r, out)
    yield swiglu_ops.swiglu, (x,)
    yield swiglu_ops.swiglu_backward, (x.detach(), randn(5, 4, dtype=torch.float32))
    block = layer_inputs((3,), 32, 32)
    yield layer_ops.feed_forward, (*block, 1e-6)
    plain = [tensor.detach() for tensor in block]
    out, h = layer_ops.feed_forward(*plain, 1e-6)
    yield layer_ops.feed_forward_backward, (*plain, h, out, 1e-6)
    plain = randn(3, 64, dtype=torch.float32), torch.ones(64), randn(32, 64, dtype=torch.float32)
    yield projection_ops.norm_linear, (*(t.clone().requires_grad_() for t in plain), 1e-6)
    y = projection_ops.norm_linear(*plain, 1e-6)
    yield projection_ops.norm_linear_backward, (*plain, y, 1e-6)
    plain = randn(3, 64, dtype=torch.float32), y, randn(64, 32, dtype=torch.float32)
    yield projection_ops.linear_residual, tuple(t.clone().requires_grad_() for t in plain)
    yield projection_ops.linear_residual_backward, plain
    heads_NHD, weight = x.view(5, 2, 4), randn(2, 4, dtype=torch.float32).requires_grad_()
    cos, sin = kernels.rotary_tables(5, 4, 10.0)
    yield rotary_ops.norm_rotary, (heads_NHD, weight, cos, sin, 1e-6)
    plain = heads_NHD.detach(), weight.detach()
    out, r = rotary_ops.norm_rotary(*plain, cos, sin, 1e-6)
    yield rotary_ops.norm_rotary_backward, (*plain, cos, sin, r, out)
    qkv = heads(1, 2, 3, 32)
    yield attention_ops.causal_heads, (*qkv, 0.2)
    plain = [x.detach() for x in qkv]
    out, lse = attention_ops.causal_heads(*plain, 0.2)
    yield attention_ops.causal_heads_backward, (out, *plain, lse, 0.2)


@only_once
def test_operators_are_registered_as_torch_wants_them() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what is never written, too
    for operator, arguments in _calls():
        tests = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(operator, arguments, test_utils=tests)


def tiny_model(n_kv_heads: int | None = None, d_ff: int = 48) -> tuple[Transformer, Tensor]:
    config = replace(
        TrainConfig.from_preset("modern").model,
        vocab_size=50, d_model=64, n_layers=2, n_heads=2, n_kv_heads=n_kv_heads, d_ff=d_ff,
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
        lambda: loss_ops.exponentials_(x.t()),
        lambda: loss_ops.head_cross_entropy(q[0, 0], x, None, torch.zeros(3).long(), None, 0, 0.0),
        lambda: loss_ops.head_cross_entropy(x, x, None, torch.zeros(3).long(), None, 0, 0.0),
        lambda: norm_ops.rms_norm(x, torch.ones(7), 1e-6, torch.float32),
        lambda: norm_ops.rms_norm_backward(x, torch.ones(8), torch.ones(3), x[:2]),
        lambda: swiglu_ops.swiglu(x[:, :7]),
        lambda: swiglu_ops.swiglu_backward(x, x),
        lambda: swiglu_ops.swiglu_backward(x, x[:, :4].bfloat16()),
        lambda: layer_ops.feed_forward(x, torch.ones(8), torch.ones(64, 8), torch.ones(8, 32), 0.0),
        lambda: layer_ops.feed_forward(*layer_inputs((3,), 32, 32)[:3], torch.ones(32, 64), 0.0),
        lambda: layer_ops.feed_forward_backward(
            *layer_inputs((3,), 32, 32), torch.ones(3, 64), torch.ones(3, 32), 0.0
        ),
        lambda: projection_ops.norm_linear(x, torch.ones(7), torch.ones(32, 8), 0.0),
        lambda: projection_ops.norm_linear(x, torch.ones(8), torch.ones(32, 8), 0.0),
        lambda: projection_ops.norm_linear_backward(*NORM_LINEAR, torch.ones(3, 32), 0.0),
        lambda: projection_ops.linear_residual(torch.ones(3, 32), q[0, 0, :2], torch.ones(32, 32)),
        lambda: projection_ops.linear_residual(torch.ones(3, 32), q[0, 0], torch.ones(32, 64)),
        lambda: projection_ops.linear_residual(x, x.bfloat16(), torch.ones(8, 8)),
        lambda: rotary_ops.norm_rotary(heads_NHD, torch.ones(1, 4), cos, sin, 1e-6),
        lambda: rotary_ops.norm_rotary(heads_NHD, torch.ones(2, 4), cos[:, :2], sin[:, :2], 1e-6),
        lambda: rotary_ops.norm_rotary(heads_NHD, torch.ones(2, 4), cos[:0], sin[:0], 1e-6),
        lambda: kernels.norm_rotary(heads_NHD[None], torch.ones(2, 4), cos[:1], sin[:1]),
        lambda: attention_ops.causal_heads(q, q[:, :1], q, 1.0),
        lambda: attention_ops.causal_heads(q, q, q.float(), 1.0),
        lambda: attention_ops.causal_heads(*[q[..., :16]] * 3, 1.0),
    ]
    for call in bad:
        with pytest.raises(InputError, match="do not belong together"):
            call()


@only_once
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by the compiler itself
@pytest.mark.parametrize("d_ff", [48, 64])  # which only takes torch's feed-forward layer, or not
def test_a_model_compiles_without_a_break(d_ff: int) -> None:
    torch.use_deterministic_algorithms(False)
    model, ids = tiny_model(d_ff=d_ff)

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
        head = loss_ops.head_cross_entropy(
            rows, randn(2500, 32, dtype=torch.float32, seed=1) / 32, torch.zeros(2500),
            torch.arange(len(rows)) % 2500, None, -100, 0.0,
        )  # fmt: skip
        matrices = muon_matrices([(64, 32, 1)] * 5, 0)
        kernels.muon_step(matrices, MuonOptions(0.1, dtype=torch.bfloat16), backend="c++")
        weights = [matrix.weight for matrix in matrices]
        gradients_ = torch.autograd.grad(normed.float().sum(), (x, w))
        block = layer_inputs((1100,), 32, 64)
        changed = layer_ops.feed_forward(*block, 1e-6)[0]
        gradients_ += (changed, *gradients(changed, *block))
        inputs = block[0], block[1], randn(96, 32, dtype=torch.float32).requires_grad_()
        projected = projection_ops.norm_linear(*inputs, 1e-6)
        gradients_ += (projected, *gradients(projected, *inputs))
        inputs = block[0], projected.detach().requires_grad_(), inputs[2].detach().t().clone()
        inputs[2].requires_grad_()
        summed = projection_ops.linear_residual(*inputs)
        gradients_ += (summed, *gradients(summed, *inputs))
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
