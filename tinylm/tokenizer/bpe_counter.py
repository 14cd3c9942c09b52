"""Counting the pieces of texts, from which byte-level BPE learns its merges."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinylm.tokenizer import bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.batches import (
    Errors,
    check_texts,
    check_threads,
    is_replace,
    surrogate_error,
)
from tinylm.tokenizer.bpe_json import last_of_each_pair
from tinylm.tokenizer.split_patterns import check_pattern


class PieceCounter(Protocol):
    """`tinylm.tokenizer.bpe_reference.BPECounter` or the compiled one."""

    def add(self, texts: Sequence[str], replace: bool, threads: int) -> None:
        """Counts the pieces of ``texts``."""

    def __len__(self) -> int:
        """How many distinct pieces there are."""

    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """All pieces in the order of their bytes, and their counts."""

    def train(
        self, byte_ids: Sequence[int], first_free_id: int, vocab_size: int, min_frequency: int
    ) -> npt.NDArray[np.uint32]:
        """Merges as rows of left, right and result."""


class BPECounter:
    """Counts what BPE learns from, batch by batch; keeps no text, only its distinct pieces."""

    def __init__(self, pattern: str = "gpt2") -> None:
        """``pattern`` says how texts are split into pieces: see `BPETokenizer`."""
        check_pattern(pattern)
        self.pattern = pattern
        module = compiled()
        counter = bpe_reference.BPECounter if module is None else module.BPECounter
        self._counter: PieceCounter = counter(pattern, 1 << 30, "/tmp")

    def add(
        self, texts: Sequence[str], threads: int | None = None, errors: Errors = "strict"
    ) -> None:
        """Counts the pieces of ``texts`` on ``threads`` threads (None: as many as there are).

        Raises:
            InputError: a text has a lone surrogate and ``errors`` is not ``"replace"``, which
                reads it as U+FFFD. Nothing of this batch is counted then.
        """
        replace = is_replace(errors)
        check_texts(texts)
        check_threads(threads)
        try:
            self._counter.add(texts, replace, threads or 0)
        except UnicodeEncodeError as error:
            raise surrogate_error(error, texts) from None

    def __len__(self) -> int:
        """How many distinct pieces there are."""
        return len(self._counter)

    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """All distinct pieces as UTF-8, in the order of their bytes, and their counts."""
        return self._counter.items()

    def learn_merges(
        self, byte_ids: Sequence[int], first_free_id: int, vocab_size: int, min_frequency: int
    ) -> npt.NDArray[np.uint32]:
        """Rows of left, right and result: see `BPETokenizer.train` for the rule."""
        merges = self._counter.train(byte_ids, first_free_id, vocab_size, min_frequency)
        return last_of_each_pair(merges.tolist())
