"""``tinylm bench``: what this machine does with each part, beside the plainest way of doing it.

Every row has two sides that give the same result, which is looked at first: tinylm as it runs
here, and the reference that it is tested against (the tokenizers in plain Python, the operators
in plain torch, generation without a cache). They take turns; the best turn of each counts. How
fast others are is a question for ``bench/`` in the source tree.
"""

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm import __version__
from tinylm.config import TrainConfig
from tinylm.data.builtin import BuiltinSource
from tinylm.data.windows import WindowSampler
from tinylm.device import Device, choose_device
from tinylm.device_step import DeviceStep, runs_on_device
from tinylm.distributed import World
from tinylm.errors import TrainingError
from tinylm.generate import Sampling, generate_ids
from tinylm.kernels import dispatch
from tinylm.kernels.check import check, synchronize
from tinylm.model import Transformer
from tinylm.optim import Optimizer
from tinylm.step import Outcome, Step, TrainStep
from tinylm.tokenizer import BPETokenizer, Tokenizer, WordTokenizer, implementation
from tinylm.tokenizer.backend import VARIABLE

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """How much work a benchmark is: the whole takes about a minute on two cores."""

    text_bytes: int = 1_000_000
    bpe_vocab_size: int = 2_000
    vocab_size: int = 10_000  # of words, and of the models
    new_tokens: int = 128
    seconds: float = 2.0  # of taking turns, at least one each
    model: tuple[tuple[str, int], ...] = ()  # fields that differ from the presets'


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


def rows(device: Device, size: Size | None = None) -> Iterator[Row]:
    """Every comparison, as soon as it is made.

    Raises:
        TrainingError: two sides do not give the same result.
    """
    size = size or Size()
    texts = _texts(size.text_bytes)
    yield from _tokenizers(texts, size)
    yield from _kernels(device)
    ids = WordTokenizer.train(texts, size.vocab_size).encode_batch(texts)[0]
    for preset in ("modern", "causal"):
        yield _training(preset, ids, device, size)
    yield _generation(device, size)


# --- the parts -----------------------------------------------------------------------------------


def _tokenizers(texts: list[str], size: Size) -> Iterator[Row]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    runs = implementation()[0]
    kinds: list[tuple[str, Callable[..., Tokenizer], int]] = [
        ("word", WordTokenizer.train, size.vocab_size),
        ("BPE", BPETokenizer.train, size.bpe_vocab_size),
    ]
    for name, learn, vocab_size in kinds:
        train = partial(learn, texts, vocab_size)
        ours, theirs = train(), _in_python(train)
        _require(ours.vocab == theirs.vocab, f"the two {name} vocabularies")
        encode, encode_plainly = (partial(_encode, t, texts) for t in (ours, theirs))
        _require(_same(encode(), encode_plainly()), f"the ids of the two {name} tokenizers")
        for what, sides in [
            (f"{name} tokenizer: train, {vocab_size:,} entries", (partial(_in_python, train), train)),
            (f"{name} tokenizer: encode", (encode_plainly, encode)),
        ]:
            reference, best = (megabytes / s for s in _best(sides, size.seconds))
            yield Row(what, "MB/s", reference, best, runs)


def _in_python(call: Call) -> Any:
    with _environment(VARIABLE, "python"):
        return call()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """By a copy, which does not remember the pieces of earlier turns."""
    return copy.copy(tokenizer).encode_batch(texts)


def _kernels(device: Device) -> Iterator[Row]:
    """Forward and backward; the error of every implementation is measured against fp64 too."""
    found = check(device.torch_device)
    for (operator, case, dtype), group in groupby(found, lambda r: (r.operator, r.case, r.dtype)):
        results = {result.implementation: result for result in group}
        for result in results.values():
            _require(result.ok, f"{result}: the result and its reference")
        kind = next((r.kind for r in results.values() if r.kind), None)
        if kind is None or dtype != device.precision:
            continue  # a variant, or arithmetic that is not trained in here
        chosen = dispatch.select(operator, device.name, kind).implementation
        reference = dispatch.IMPLEMENTATIONS[operator][-1]
        rates = (1000 / results[name].milliseconds for name in (reference, chosen))
        yield Row(f"{operator}, {case}", "calls/s", *rates, chosen)


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
    slow, fast = (tokens / s for s in _best((reference, ours.one), 2 * size.seconds, device))
    what = f"training {preset}, {config.batch_size} windows of {config.seq_len} tokens"
    return Row(what, "tokens/s", slow, fast, f"{device.precision}, {ours.step.about}")


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
    calls = partial(generate, False), partial(generate, True)
    rates = (size.new_tokens / s for s in _best(calls, size.seconds, device))
    return Row(f"generation, modern, {size.new_tokens} tokens of one text", "tokens/s", *rates, "cache")


# --- what they share -----------------------------------------------------------------------------


def _texts(limit: int) -> list[str]:
    """The first ``limit`` bytes or so of documentation and sources of Python's library."""
    texts, left = [], limit
    for text in BuiltinSource().documents():
        texts.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return texts


def _best(calls: Sequence[Call], seconds: float, device: Device | None = None) -> list[float]:
    """Seconds that each call takes, in the best of its turns; each has run once already."""
    best, end = [float("inf")] * len(calls), time.perf_counter() + seconds
    while True:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if device is not None:
                synchronize(device.torch_device)
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() >= end:
            return best


def _require(same: bool, what: str) -> None:
    if not same:
        raise TrainingError(f"{what} differ: tinylm is wrong here, and was not timed further")


def _same(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    return all(map(np.array_equal, a, b))


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
