"""The check of the kernels itself: that it measures what the model calls, and on a GPU the rest."""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm import kernels
from tinylm.config import TrainConfig
from tinylm.device import choose_device
from tinylm.generate import Context
from tinylm.kernels import check, dispatch, first_check, table
from tinylm.lm import load
from tinylm.model import Transformer
from tinylm.run import resume_config, train


def test_the_check_itself_as_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, where torch's implementations are all there is to compare."""
    monkeypatch.chdir(tmp_path)  # it finds the same tinylm from anywhere
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = list(first_check.run(first_check.command(torch.device("cpu"), False, 60), 120))
    assert all(r.ok for r in found), [str(r) for r in found if not r.ok]
    assert {r.operator for r in found} == set(dispatch.IMPLEMENTATIONS)
    compared = {dispatch.torch_choice(name, "cpu")[0] for name in dispatch.IMPLEMENTATIONS}
    assert {r.implementation for r in found} == compared


calls = itertools.count()


@pytest.mark.parametrize(
    ("kernel", "failure"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2.1 * x, None),
        (lambda x: 2 * x + next(calls) * 1e-7, "another result when repeated"),
        (lambda x: torch.empty_like(x, requires_grad=True), "not all values are finite"),
        (lambda x: x @ x, r"raised RuntimeError: mat1 and mat2 shapes"),
    ],
    ids=["right", "wrong", "unsteady", "unwritten", "raising"],
)
def test_what_is_wrong_with_a_kernel_is_seen(
    kernel: Callable[[torch.Tensor], torch.Tensor],
    failure: str | None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "triton_refusal", lambda device_type: None)
    monkeypatch.setattr(check, "SECONDS", 0)

    def run(backend: str, x: torch.Tensor) -> torch.Tensor:
        return kernel(x) if backend == "triton" else x + x

    case = check.Case(
        "layer_norm", "x", ((3, 4),), run, gradients="unwritten" not in request.node.name
    )
    own, *others = check._results(case, torch.device("cpu"), torch.float32, True)
    assert own.implementation == "triton"
    assert own.ok == ("right" in request.node.name)
    assert re.match(failure or "None", str(own.failure))
    assert [r.implementation for r in others] == ["torch", "reference"]
    assert all(r.ok for r in others)


def test_train_and_load_ask_for_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels, "prepare", lambda device, *say: asked.append((device, len(say))))
    load(trained, device="cpu")
    assert asked == [(torch.device("cpu"), 0)]
    train(resume_config(trained), quiet=True)  # it is finished already
    assert asked[1:] == [(torch.device("cpu"), 1), (torch.device("cpu"), 0)]


@pytest.mark.parametrize("preset", ["modern", "causal", "notebook"])
def test_the_check_measures_the_calls_that_the_presets_make(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with autocast, and generation in fp32, on a CPU that stands for a GPU."""
    measured = set()
    for case in check.cases("cuda", interpreting=False):
        for dtype in [torch.bfloat16] + [torch.float32] * case.fp32:
            inputs = [torch.empty(s, dtype=dtype, device="meta") for s in case.shapes]
            if case.kind is not None:
                measured.add((case.operator, case.kind(*inputs)))
    called = set()
    original = dispatch.select

    def note(operator: str, device: str, kind: str = "") -> Any:
        if "triton" in dispatch.IMPLEMENTATIONS[operator]:  # else there is nothing to measure
            called.add((operator, kind))
        return original(operator, device, kind)

    monkeypatch.setattr(dispatch, "select", note)
    config = TrainConfig.from_preset(preset)
    model = Transformer(config.model)
    ids = torch.zeros(1300 // config.seq_len, config.seq_len, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.loss(ids, ids)
        if config.model.causal:
            model.loss(ids, ids, start_BT=kernels.document_starts(ids, 0))
    assert called
    assert called <= measured
    if config.model.causal:
        context = Context(model, [[1] * 9], use_cache=True)
        with torch.no_grad():
            context.next_logits()  # of the prompt
            context.sequences[0].append(1)
            called.clear()
            context.next_logits()
        assert called
        assert called <= measured


# --- on a GPU ------------------------------------------------------------------------------------

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is remembered, neither before nor after."""
    table.forget()
    dispatch.forget()
    yield
    table.forget()
    dispatch.forget()


@pytest.mark.usefixtures("fresh")
class TestOnAGPU:
    pytestmark = on_a_gpu

    def test_the_first_use_finds_the_kernels_right(self, monkeypatch: Any) -> None:
        monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
        said: list[str] = []
        device = torch.device("cuda")
        kernels.prepare(device, said.append)
        found = table.remembered(device)
        assert found is not None
        assert (found.failure, found.unfinished) == (None, None), said
        assert all(r.ok for r in found.results), [str(r) for r in found.results if not r.ok]
        assert all(r.milliseconds > 0 for r in found.results)
        assert len(said) == 2
        table.forget()
        kernels.prepare(device, said.append)
        assert len(said) == 2
        assert {s.operator for s in dispatch.selections("cuda:0")} == set(dispatch.IMPLEMENTATIONS)

    def test_what_is_chosen_is_right(self, monkeypatch: Any) -> None:
        monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
        chosen = choose_device("cuda")
        device, dtype = chosen.torch_device, chosen.dtype
        kernels.prepare(device, lambda line: None)
        for case in check.cases("cuda", interpreting=False):
            inputs = [check.randn(s, i).to(device, dtype) for i, s in enumerate(case.shapes)]
            wide = [x.double() for x in inputs]
            reference = dispatch.IMPLEMENTATIONS[case.operator][-1]
            dout = check.randn(case.run(reference, *wide).shape, 9).to(device)
            expected = check.outputs(case, reference, wide, dout)
            actual = check.outputs(case, None, inputs, dout)  # as it is chosen
            for a, e in zip(actual, expected, strict=True):
                assert check.relative_error(a, e) <= check.TOLERANCE[dtype], case.name

    def test_a_lost_device_hurts_only_the_process_that_checks(self, monkeypatch: Any) -> None:
        x = torch.ones(9, device="cuda")
        code = (
            "import torch; x = torch.zeros(9, device='cuda');"
            "x[torch.full((1,), 2**40, device='cuda')] = 1; torch.cuda.synchronize()"
        )
        monkeypatch.setattr(first_check, "command", lambda *_: (sys.executable, "-c", code))
        found = first_check.measure(torch.device("cuda"), print)
        assert found.failure is not None
        assert "CUDA" in found.failure or "Error" in found.failure
        assert float(x.sum()) == 9
        assert dispatch.select("rms_norm", "cuda:0", "fp16, C <= 256").implementation == "torch"
