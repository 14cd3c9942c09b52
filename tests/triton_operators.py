"""What all Triton kernels have in common, and the models that are trained with them."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton_inputs import (
    DEVICE,
    DTYPE,
    ONLY_FP16,
    TOLERANCE,
    WARNINGS,
    assert_close,
    fp64,
    poisoned_and_never_falling_back,  # noqa: F401  # a fixture, which pytest uses
    randn,
)

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.kernels import dispatch
from tinylm.model import Transformer

pytestmark = WARNINGS


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
    tables = [t.to(DEVICE) for t in kernels.rotary_tables(0, 16, 100.0)]
    heads = kernels.norm_rotary(randn(2, 0, 3, 16), randn(3, 16), *tables, backend="triton")
    assert heads.shape == (2, 0, 3, 16)
    assert kernels.swiglu(randn(0, 6), backend="triton").shape == (0, 3)
    assert len(caplog.records) == 5
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
    tables = [t.to(DEVICE) for t in kernels.rotary_tables(1, 16, 100.0)]
    calls = [
        lambda x: kernels.causal_attention(x, x, x, backend="triton"),
        lambda x: kernels.rms_norm(x, weight, backend="triton"),
        lambda x: kernels.layer_norm(x, weight, backend="triton"),
        lambda x: kernels.norm_rotary(x, weight[None].expand(9, -1), *tables, backend="triton"),
        lambda x: kernels.swiglu(x, backend="triton"),
        lambda x: kernels.linear_cross_entropy(x[0, 0], x[0, 0], targets, backend="triton"),
        lambda x: kernels.linear_cross_entropy(
            x[0, 0], weight.expand(9, 16), targets, backend="triton"
        ),
    ]
    for call in calls:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"autograd|twice"):
            gradient.square().sum().backward()


def _operator_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    from tinylm.kernels.triton import attention, linear_cross_entropy, norm, rotary, swiglu

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
    heads, weights = randn(2, 5, 3, 16).requires_grad_(), randn(3, 16, seed=1).requires_grad_()
    tables = tuple(t.to(DEVICE) for t in kernels.rotary_tables(5, 16, 100.0))
    yield rotary.rotary_forward, (heads, weights, *tables, 1e-6)
    plain = heads.detach(), weights.detach(), *tables
    rstd = rotary.rotary_forward(*plain, 1e-6)[1]
    yield rotary.rotary_backward, (randn(2, 5, 3, 16), *plain, rstd)
    yield swiglu.gated_forward, (x,)
    yield swiglu.gated_backward, (randn(5, 8), x.detach())
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
