"""Text to ids and back: a word-level and a byte-level BPE tokenizer behind one interface."""

import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from tinylm.errors import InputError
from tinylm.tokenizer.backend import implementation
from tinylm.tokenizer.hf_json import read_tokenizer_json
from tinylm.tokenizer.word import WordTokenizer

__all__ = ["BPETokenizer", "Tokenizer", "WordTokenizer", "implementation", "load_tokenizer"]


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids are dense: 0 to ``vocab_size - 1``."""

    @property
    def kind(self) -> str:
        """``"word"`` or ``"bpe"``."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""

    @property
    def unk_id(self) -> int | None:
        """The id of all that the vocabulary lacks; None if it lacks nothing."""

    @property
    def vocab(self) -> dict[str, int]:
        """Every token's id; a copy."""

    def encode(self, text: str, add_eos: bool = True) -> list[int]:
        """The ids of one text."""

    def encode_batch(
        self, texts: Sequence[str], add_eos: bool = True, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array, and where each text starts in it (int64, n + 1)."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json``."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of the file ``path``, whichever kind it is.

    Raises:
        InputError: the file cannot be read or holds no tokenizer that tinylm knows.
    """
    kind = read_tokenizer_json(path)["model"]["type"]
    if kind == "WordLevel":
        return WordTokenizer.load(path)
    if kind == "BPE":
        tokenizer: Tokenizer = _bpe_tokenizer().load(path)
        return tokenizer
    raise InputError(f"{os.fspath(path)} has a model of type {kind!r}, not 'WordLevel' or 'BPE'")


def _bpe_tokenizer() -> Any:
    return import_module("tinylm.tokenizer.bpe").BPETokenizer


def __getattr__(name: str) -> Any:
    if name == "BPETokenizer":
        return _bpe_tokenizer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
