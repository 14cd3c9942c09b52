"""``tinylm bench``: what this machine does with each part, beside the plainest way of doing it.

Every row has two sides that give the same result, which is looked at first: tinylm as it runs
here, and the reference that it is tested against (the tokenizers in plain Python, the operators
in plain torch, generation without a cache). They take turns; the best turn of each counts. How
fast others are is a question for ``bench/`` in the source tree.
"""

import copy
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm import __version__
from tinylm.config import TrainConfig
from tinylm.data.windows import WindowSampler
from tinylm.device import Device
from tinylm.device_step import DeviceStep, runs_on_device
from tinylm.distributed import World
from tinylm.errors import TrainingError
from tinylm.generate import Sampling, generate_ids
from tinylm.kernels import check, dispatch
from tinylm.model import Transformer
from tinylm.optim import Optimizer
from tinylm.step import Outcome, Step, TrainStep
from tinylm.tokenizer import BPETokenizer, WordTokenizer, implementation
from tinylm.tokenizer.backend import VARIABLE

Call = Callable[[], Any]
# The reference and tinylm. Before each turn a side makes what is timed, and that is not.
Sides = tuple[Callable[[], Call], Callable[[], Call]]


@dataclass(frozen=True)
class Size:
    """How much work a benchmark is: the whole takes about a minute on two cores."""

    text_bytes: int = 1_000_000
    bpe_vocab_size: int = 2_000
    vocab_size: int = 10_000  # of words, and of the models
    new_tokens: int = 128
    seconds: float = 2.0  # of taking turns, at least one each
    model: tuple[tuple[str, int], ...] = ()  # fields that differ from the presets'


USUAL = Size()


@dataclass(frozen=True)
class Row:
    """One comparison, in ``unit``: the higher the better."""

    what: str
    unit: str
    reference: float
    tinylm: float
    runs: str  # the implementation that tinylm has chosen here

    @property
    def ratio(self) -> float:
        return self.tinylm / self.reference

    def __str__(self) -> str:
        return (
            f"{self.what:58}{_short(self.reference):>11}{_short(self.tinylm):>11} {self.unit:9}"
            f"{self.ratio:7.1f}×  {self.runs}"
        )


HEAD = f"{'':58}{'reference':>11}{'tinylm':>11} {'':9}{'':>8}  runs as"


def about(device: Device) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device.torch_device) if gpu else _processor(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "tinylm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def rows(device: Device) -> Iterator[Row]:
    """Every comparison, as soon as it is made.

    Raises:
        TrainingError: two sides do not give the same result.
    """
    size = USUAL
    texts = _texts(size.text_bytes)
    yield from _tokenizers(texts, size)
    yield from _kernels(device)
    ids = WordTokenizer.train(texts, size.vocab_size).encode_batch(texts)[0]
    for preset in ("modern", "causal"):
        yield _training(preset, ids, device, size)
    yield _generation(device, size)


# --- the parts -----------------------------------------------------------------------------------


def _tokenizers(texts: list[str], size: Size) -> Iterator[Row]:
    kinds: list[tuple[str, Call]] = [
        ("word", partial(WordTokenizer.train, texts, size.vocab_size)),
        ("BPE", partial(BPETokenizer.train, texts, size.bpe_vocab_size)),
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, train in kinds:
        yield from _tokenizer(f"{name} tokenizer", train, texts, megabytes, size.seconds)


def _tokenizer(
    name: str, train: Call, texts: list[str], megabytes: float, seconds: float
) -> Iterator[Row]:
    ours, theirs = train(), _in_python(train)
    ids, same = (tokenizer.encode_batch(texts)[0] for tokenizer in (ours, theirs))
    _require(ours.vocab == theirs.vocab, f"{name}: the two vocabularies")
    _require(np.array_equal(ids, same), f"{name}: the ids of both sides")

    def fresh() -> Call:
        """Encodes with a copy, which does not remember the pieces of texts it has seen."""
        return partial(copy.copy(ours).encode_batch, texts)

    sides: Sides = (lambda: partial(_in_python, train)), (lambda: train)
    runs = implementation()[0]
    yield _row(
        f"{name}, train {ours.vocab_size:,} entries", "MB/s", megabytes, sides, seconds, runs
    )
    sides = (lambda: _in_python(fresh)), fresh
    yield _row(f"{name}, encode", "MB/s", megabytes, sides, seconds, runs)


def _in_python(call: Call) -> Any:
    with _environment(VARIABLE, "python"):
        return call()


def _kernels(device: Device) -> Iterator[Row]:
    """Forward and backward; the errors of both sides are measured against fp64."""
    for case in check.training_cases():
        found = check.all_implementations(case, device.torch_device, device.dtype)
        results = {result.implementation: result for result in found}
        kind = next(result.kind for result in found if result.kind)
        chosen = dispatch.select(case.operator, device.name, kind).implementation
        sides = [results[name] for name in (dispatch.IMPLEMENTATIONS[case.operator][-1], chosen)]
        _require(all(side.ok for side in sides), f"{case.operator} and its reference")
        slow, fast = (1000 / side.milliseconds for side in sides)
        yield Row(f"{case.operator}, {case.name}", "calls/s", slow, fast, chosen)


def _training(preset: str, ids: np.ndarray, device: Device, size: Size) -> Row:
    config = TrainConfig.from_preset(preset, embedding_init="random", **dict(size.model))
    config = replace(config, model=replace(config.model, vocab_size=size.vocab_size))
    with _environment(dispatch.ENVIRONMENT_VARIABLE, "reference"):
        plain = _Training(replace(config, cuda_graph=False), ids, device)
        first = plain.losses(3)
    ours = _Training(config, ids, device)
    _require(np.allclose(first, ours.losses(3), rtol=0.02), f"the losses of {preset}")

    def reference() -> None:
        with _environment(dispatch.ENVIRONMENT_VARIABLE, "reference"):
            plain.one()

    tokens = config.batch_size * config.seq_len
    what = f"training {preset}, {config.batch_size} windows of {config.seq_len} tokens"
    sides = (lambda: reference), (lambda: ours.one)
    runs = f"{device.precision}, {ours.step.about}"
    return _row(what, "tokens/s", tokens, sides, 2 * size.seconds, runs, device)


class _Training:
    """The training step of a run, without what comes between steps."""

    def __init__(self, config: TrainConfig, ids: np.ndarray, device: Device) -> None:
        on_device = runs_on_device(device, World())
        model = Transformer(config.model).to(device.torch_device)
        muon_dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
        parts = model, Optimizer(model, config, muon_dtype, on_device), config, device
        sampler = WindowSampler(ids, config.seq_len, config.batch_size, config.stride)
        self.step: Step = (
            DeviceStep(*parts, sampler) if on_device else TrainStep(*parts, sampler=sampler)
        )
        self._number = 0
        self.step.begin(0, 0)

    def one(self) -> list[Outcome]:
        self._number += 1
        return self.step.issue(self._number, 0.1)

    def losses(self, count: int) -> list[float]:
        outcomes = [outcome for _ in range(count) for outcome in self.one()]
        return [outcome.loss for outcome in outcomes + self.step.settle()]


def _generation(device: Device, size: Size) -> Row:
    config = TrainConfig.from_preset("modern", **dict(size.model)).model
    model = Transformer(replace(config, vocab_size=size.vocab_size)).to(device.torch_device).eval()
    greedy = Sampling(max_new_tokens=size.new_tokens, temperature=0)

    def generate(use_cache: bool) -> list[Any]:
        steps = generate_ids(model, [[2, 3, 5]], greedy, eos_id=-1, use_cache=use_cache)
        return [token for (token,) in steps]

    _require(generate(True) == generate(False), "the texts with cache and without")
    sides = (lambda: partial(generate, False)), (lambda: partial(generate, True))
    what = f"generation, modern, {size.new_tokens} tokens of one text"
    return _row(what, "tokens/s", size.new_tokens, sides, size.seconds, "with a cache", device)


# --- what they share -----------------------------------------------------------------------------


def _texts(limit: int) -> list[str]:
    """The first ``limit`` characters of sources of Python's library."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        left = limit - sum(map(len, texts))
        texts.append(path.read_text("utf-8", "replace")[:left])
    return [text for text in texts if text]


def _row(
    what: str,
    unit: str,
    amount: float,
    sides: Sides,
    seconds: float,
    runs: str,
    device: Device | None = None,
) -> Row:
    """How much of ``amount`` each side does in a second, in the best of its turns."""
    best, end = [float("inf")] * 2, time.perf_counter() + seconds
    while True:
        for i, side in enumerate(sides):
            call = side()
            start = time.perf_counter()
            call()
            if device is not None:
                check.synchronize(device.torch_device)
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() >= end:
            return Row(what, unit, amount / best[0], amount / best[1], runs)


def _require(same: bool, what: str) -> None:
    if not same:
        raise TrainingError(f"{what} differ: tinylm is wrong here, and was not timed further")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Within it an environment variable has another value, and the operators go by it."""
    before = os.environ.get(name)
    os.environ[name] = value
    dispatch.forget()
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
        dispatch.forget()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
