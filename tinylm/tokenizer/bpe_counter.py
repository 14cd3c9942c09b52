"""Counting the pieces of texts, from which byte-level BPE learns its merges."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.files import disk_errors
from tinylm.tokenizer import bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.batches import (
    Errors,
    Text,
    check_threads,
    is_replace,
    surrogate_error,
    to_texts,
)
from tinylm.tokenizer.bpe_json import last_of_each_pair
from tinylm.tokenizer.progress import Progress, Teller
from tinylm.tokenizer.split_patterns import check_pattern

DEFAULT_MEMORY = 1 << 30


class PieceCounter(Protocol):
    """`tinylm.tokenizer.bpe_reference.BPECounter` or the compiled one.

    ``progress`` is called now and then with how much of a call is done, and of how much.
    """

    def add(
        self,
        texts: Sequence[str],
        replace: bool,
        threads: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Counts the pieces of ``texts``; progress is in characters."""

    def __len__(self) -> int:
        """How many distinct pieces there are."""

    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """All pieces in the order of their bytes, and their counts."""

    def train(
        self,
        byte_ids: Sequence[int],
        first_free_id: int,
        vocab_size: int,
        min_frequency: int,
        reserved: set[bytes],
        progress: Callable[[int, int], None] | None,
    ) -> npt.NDArray[np.uint32]:
        """Merges as rows of left, right and result; progress is in tokens."""


class BPECounter:
    """Counts what BPE learns from, batch by batch; keeps no text, only its distinct pieces.

    They are kept in memory as long as ``memory`` bytes hold them, then on disk: sorted, in an
    unnamed file in ``temporary_folder``. Nothing is left out, so the merges do not depend on it.
    The Python implementation keeps all in memory.
    """

    def __init__(
        self,
        pattern: str = "gpt2",
        memory: int = DEFAULT_MEMORY,
        temporary_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """``pattern`` says how texts are split into pieces: see `BPETokenizer`.

        Raises:
            InputError: ``pattern`` is unknown, ``memory`` is below 1, or there is no such folder.
        """
        check_pattern(pattern)
        if memory < 1:
            raise InputError(f"memory is {memory}; it must be at least 1, in bytes")
        self.pattern = pattern
        self._folder = os.fspath(temporary_folder or tempfile.gettempdir())
        if not os.path.isdir(self._folder):
            raise InputError(f"no such folder: {self._folder}; it is for temporary files")
        module = compiled()
        counter = bpe_reference.BPECounter if module is None else module.BPECounter
        self._counter: PieceCounter = counter(pattern, min(memory, 1 << 62), self._folder)

    def add(
        self,
        texts: Iterable[Text],
        threads: int | None = None,
        errors: Errors = "strict",
        progress: Progress | None = None,
    ) -> None:
        """Counts the pieces of ``texts`` on ``threads`` threads (None: as many as there are).

        ``progress`` is told of the stage ``"count"``, in characters; what it raises ends the call
        as Ctrl-C does: some of the texts are then counted.

        Raises:
            InputError: a text is not UTF-8 or has a lone surrogate and ``errors`` is not
                ``"replace"``, which reads U+FFFD there; then nothing of this batch is counted. Or
                the disk is full.
        """
        replace = is_replace(errors)
        texts = to_texts(texts, errors)
        check_threads(threads)
        tell = Teller(progress, "count")
        try:
            with disk_errors(self._folder):
                self._counter.add(texts, replace, threads or 0, tell if progress else None)
        except UnicodeEncodeError as error:
            raise surrogate_error(error, texts) from None
        tell.last(total := sum(map(len, texts)), total)

    def __len__(self) -> int:
        """How many distinct pieces there are."""
        with disk_errors(self._folder):
            return len(self._counter)

    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """All distinct pieces as UTF-8, in the order of their bytes, and their counts."""
        with disk_errors(self._folder):
            return self._counter.items()

    def learn_merges(
        self,
        byte_ids: Sequence[int],
        first_free_id: int,
        vocab_size: int,
        min_frequency: int,
        reserved: Iterable[bytes] = (),
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint32]:
        """Rows of left, right and result: see `BPETokenizer.train` for the rule.

        No merge results in one of ``reserved``. ``progress`` is told of the stage ``"merge"``, in
        tokens of the vocabulary.
        """
        tell = Teller(progress, "merge")
        with disk_errors(self._folder):
            merges = self._counter.train(
                byte_ids,
                first_free_id,
                vocab_size,
                min_frequency,
                set(reserved),
                tell if progress else None,
            )
        tell.last(first_free_id + len(np.unique(merges[:, 2])), vocab_size)
        return last_of_each_pair(merges.tolist())
