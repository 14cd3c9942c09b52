"""Small inputs that many tests share. No test reads anything from outside the repository."""

import json
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no fault of what is tested; what must be quick is measured in CPU time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

WORDS = (
    "the of and to in a is that for it was on with as be at by this not are from or have an "
    "they which one you had were all her she there would their we him been has when who will "
    "no more if out so said what up its about into than them can only other time new some could"
).split()


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Texts with something to learn: each word is most often followed by one of three others."""
    generator = random.Random(seed)
    followers = {word: random.Random(word).sample(WORDS, 3) for word in WORDS}
    documents = []
    for _ in range(count):
        word, words = generator.choice(WORDS), []
        for _ in range(generator.randint(20, 80)):
            words.append(word)
            word = generator.choice(followers[word] if generator.random() < 0.9 else WORDS)
        documents.append(" ".join(words).capitalize() + ".")
    return documents


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's cache, or what another test put into one."""
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl file of 200 short documents."""
    return write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))


SMALL: dict[str, Any] = {
    "vocab_size": 60, "tokenizer": "word", "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48,
    "seq_len": 16, "max_seq_len": 32, "batch_size": 8, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes the configuration of a run of a few seconds; options override."""
    from tinylm.config import TrainConfig

    def make(preset: str = "modern", **options: Any) -> TrainConfig:
        base = SMALL if preset == "modern" else {
            k: v for k, v in SMALL.items() if k not in ("n_layers", "max_seq_len")
        }  # fmt: skip
        merged = base | {"data": str(corpus), "out": str(tmp_path / "run"), "steps": 20} | options
        return TrainConfig.from_preset(preset, **merged)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run of the modern preset, for tests that only read it."""
    import os

    from tinylm.config import TrainConfig
    from tinylm.run import train

    folder = tmp_path_factory.mktemp("trained")
    os.environ["TINYLM_CACHE"] = str(folder / "cache")
    data = write_jsonl(folder / "corpus.jsonl", make_documents(300))
    options = SMALL | {"data": str(data), "out": str(folder / "run"), "steps": 150, "lr": 1e-2}
    train(TrainConfig.from_preset("modern", **options), quiet=True)
    return folder / "run"


@pytest.fixture
def meta_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets models compute on tensors without values, see `meta_device`."""
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())
    adam = sys.modules["torch.optim.adam"]  # torch.optim itself hides it
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
