"""Evaluations that stay on a device, here on a CPU: the sums of `evaluate`, of the weights as they
are at the time, and nothing in them that a CUDA graph could not hold.

What needs a GPU stands in test_gpu.py.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_device import MetaDevice, OnDeviceOnly
from test_device_step import PRESETS, VOCABULARY, make

from tinylm import device_evaluation, graph
from tinylm.device import Device
from tinylm.device_evaluation import DeviceEvaluation
from tinylm.evaluate import evaluate
from tinylm.model import Transformer

IDS = np.random.default_rng(1).integers(0, VOCABULARY, 400).astype(np.uint16)
CPU = Device("cpu", "fp32", "for a test")


def evaluation(
    model: Transformer,
    ids: np.ndarray = IDS,
    *,
    device: Device = CPU,
    graphed: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> DeviceEvaluation:
    asked: dict[str, Any] = {"seq_len": 8, "eos_id": 1, "unk_id": 0, "limit": None}
    asked |= options
    return DeviceEvaluation(model, ids, device=device, graphed=graphed, say=say, **asked)


def assert_same_totals(ours: Any, theirs: Any) -> None:
    assert asdict(ours) == pytest.approx(asdict(theirs), rel=1e-5)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_evaluation, "batch_size", lambda seq_len: 7)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("prefix_only", [True, False])
@pytest.mark.usefixtures("small_batches")
def test_sums_are_those_of_evaluate_as_the_model_learns(preset: str, prefix_only: bool) -> None:
    step = make(preset=preset)
    model = step.model.train()
    ours = evaluation(model, prefix_only=prefix_only)
    seen = []
    for number in range(1, 4):
        theirs = evaluate(model, IDS, eos_id=1, unk_id=0, seq_len=8, prefix_only=prefix_only)
        assert_same_totals(ours(), theirs)
        assert model.training
        seen.append(theirs.nats)
        step.issue(number, 1.0)
    assert len(set(seen)) == 3  # it did learn


@given(
    tokens=st.integers(1, 150),
    seq_len=st.integers(1, 32),
    limit=st.one_of(st.none(), st.integers(1, 100)),
    batch=st.integers(1, 9),
)
@settings(max_examples=40)
def test_any_number_of_windows_in_batches_of_one_size(
    tokens: int, seq_len: int, limit: int | None, batch: int
) -> None:
    ids, options = IDS[:tokens], {"eos_id": 1, "unk_id": 0, "seq_len": seq_len, "limit": limit}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_evaluation, "batch_size", lambda seq_len: batch)
        ours = evaluation(MODEL, ids, **options)
    assert ours._x_NBT.shape[1] <= batch
    assert_same_totals(ours(), evaluate(MODEL, ids, **options))


MODEL: Transformer = make(preset="causal").model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("meta_works")
def test_a_batch_never_asks_the_host(preset: str) -> None:
    device = MetaDevice("meta", "bf16", "for a test")
    model = make(preset=preset, device=device).model
    for prefix_only in (True, False):
        batches = evaluation(model, device=device, prefix_only=prefix_only)
        with torch.no_grad(), OnDeviceOnly() as seen:
            batches.compute()
        assert "aten.lift_fresh.default" not in seen.operations  # a constant of the host
        assert "aten.logsumexp.default" in seen.operations


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("works", [True, False])
def test_a_capture_leaves_no_trace_in_the_sums(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    captures = []

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        captures.append(compute)
        return compute

    monkeypatch.setattr(graph, "_warm_up", lambda compute: [compute() for _ in range(20)])
    monkeypatch.setattr(graph, "_capture", capture)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
    monkeypatch.setattr("torch.cuda.set_stream", lambda stream: None)
    ours, theirs = evaluation(MODEL, graphed=True, say=said.append), evaluation(MODEL)
    for _ in range(2):
        assert ours() == theirs()
    assert len(captures) == works
    failed = (
        "evaluations run eagerly: capturing them as a CUDA graph failed "
        "(operation not permitted when stream is capturing)"
    )
    assert said == ([] if works else [failed])
