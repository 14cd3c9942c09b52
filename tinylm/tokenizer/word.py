"""Word-level tokenizer: lower-case, split at white space and punctuation, look each word up."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from tinylm.errors import InputError
from tinylm.files import atomic_write
from tinylm.tokenizer.word_reference import EOS, EOS_ID, UNK, UNK_ID, WordCounter, WordEncoder


class WordTokenizer:
    kind = "word"
    unk_id: int | None = UNK_ID
    eos_id: int = EOS_ID

    def __init__(self, words: Sequence[str]) -> None:
        """``words`` are those after ``<UNK>`` and ``<EOS>``, in the order of their ids from 2."""
        self._vocab = {UNK: UNK_ID, EOS: EOS_ID} | {word: 2 + i for i, word in enumerate(words)}
        self._pieces = [UNK, EOS, *words]
        self._encoder = WordEncoder(self._vocab)

    @classmethod
    def from_counter(cls, counter: WordCounter, vocab_size: int = 10_000) -> "WordTokenizer":
        if vocab_size < 3:
            raise InputError(f"vocab_size is {vocab_size}; it must be at least 3: <UNK>, <EOS>, words")
        return cls(counter.most_common(vocab_size - 2))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 10_000, threads: int | None = None) -> "WordTokenizer":
        counter = WordCounter()
        for batch in _batches(texts):
            counter.add(batch, threads)
        return cls.from_counter(counter, vocab_size)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def encode(self, text: str, add_eos: bool = True) -> list[int]:
        ids, _ = self.encode_batch([text], add_eos)
        return ids.tolist()

    def encode_batch(
        self, texts: Sequence[str], add_eos: bool = True, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        return self._encoder.encode_batch(texts, add_eos, dtype, threads)

    def decode(self, ids: Iterable[int]) -> str:
        n = len(self._pieces)
        return " ".join(self._pieces[i] if 0 <= i < n else UNK for i in ids)


def _batches(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch
