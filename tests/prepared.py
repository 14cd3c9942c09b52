"""What the tests of data preparation share: made-up texts, and one way to prepare them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylm.data import DataConfig, Dataset, prepare
from tinylm.errors import InputError


def some_texts(n: int = 300, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfg" for b in ("a", "é", "ou") for c in ("", "n", "'s", "東")]
    texts = [
        " ".join(rng.choices(words, k=rng.randint(1, 40))) + rng.choice([".", "?\r\n", ""])
        for _ in range(n)
    ]
    return [*texts, "...", "rare\ud800word", texts[0], texts[0]]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def word_config(data: str, **changes: Any) -> DataConfig:
    return DataConfig(data=data, **{"tokenizer": "word", "vocab_size": 20, **changes})


def make(config: DataConfig, folder: Path, **options: Any) -> Dataset:
    return prepare(config, cache_dir=folder, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
