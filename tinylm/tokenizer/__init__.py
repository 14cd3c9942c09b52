"""Text to ids and back: a word-level and a byte-level BPE tokenizer behind one interface."""

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from tinylm.errors import InputError
from tinylm.tokenizer.backend import implementation
from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.hf_json import read_tokenizer_json
from tinylm.tokenizer.word import WordCounter, WordTokenizer

__all__ = [
    "BPETokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordCounter",
    "WordTokenizer",
    "implementation",
    "load_tokenizer",
]


class StreamDecoder(Protocol):
    """Turns ids that come one at a time into text."""

    def push(self, token_id: int) -> str:
        """The text that is certain after ``token_id``: whole characters only."""

    def finish(self) -> str:
        """What is left at the end."""


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

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""

    def id_to_token(self, token_id: int) -> str:
        """The entry of an id as the vocabulary writes it."""

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
        return BPETokenizer.load(path)
    raise InputError(f"{os.fspath(path)} has a model of type {kind!r}, not 'WordLevel' or 'BPE'")
