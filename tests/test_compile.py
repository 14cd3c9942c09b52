"""torch.compile of the operators in torch, as one graph; for Triton's: `triton_operators.py`."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operators import randn
from torch import Tensor

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.model import Transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler has its own


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = expected.abs().max().clamp(min=1e-3)
    assert ((actual - expected).abs().max() <= tolerance * scale).item()


def every_operator(x: Tensor, weight: Tensor, head: Tensor) -> Tensor:
    h = kernels.rms_norm(x, weight)
    h = kernels.layer_norm(h, weight, residual=x)[0]
    h = kernels.apply_rotary(h, *kernels.rotary_tables(x.shape[2], x.shape[3], 100.0))
    h = kernels.causal_attention(h, h + 1, h * 2)
    targets = torch.arange(h.numel() // 16) % len(head)
    return kernels.linear_cross_entropy(h.reshape(-1, 16), head, targets)


@pytest.mark.slow  # the C++ compiler takes some twenty seconds
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_operators_compile_to_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    shapes = (1, 2, 70, 16), (16,), (97, 16)
    inputs = [randn(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes)]
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(every_operator, fullgraph=True, options={"compile_threads": 1})
    expected, loss = every_operator(*inputs), compiled(*inputs)
    assert_same(loss, expected)
    pairs = zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    )
    for actual, wanted in pairs:
        assert_same(actual, wanted)


@pytest.mark.parametrize(("preset", "bf16"), [("modern", True), ("causal", False)])
def test_a_model_compiles_for_any_length(preset: str, bf16: bool) -> None:
    """With its gradients; by ``aot_eager``, which traces all of it and runs no C++ compiler."""
    sizes = {"vocab_size": 50, "d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 48}
    config = replace(TrainConfig.from_preset(preset).model, max_seq_len=80, **sizes)
    model = Transformer(config)
    for parameter in model.parameters():  # else the first layers' gradients are 0
        parameter.data += 0.1 * randn(*parameter.shape, dtype=torch.float32)
    ids = torch.arange(3 * 71).mul(7).remainder(50).view(3, 71)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    for T in (70, 40):
        results = []
        for loss_of in (model.loss, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(ids[:, :T], ids[:, 1 : T + 1])
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for expected, actual in zip(*results, strict=True):
            assert_same(actual, expected, 5e-2 if bf16 else 1e-5)
