# ruff: noqa: N999
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

unicode_version: str

class WordCounter:
    def __init__(self) -> None: ...
    def add(
        self,
        texts: Iterable[str | Buffer],
        threads: int | None = None,
        replace: bool = False,
        *,
        piece_length: int = ...,
    ) -> None: ...
    def most_common(self, n: int) -> list[str]: ...
    def items(self) -> tuple[list[str], npt.NDArray[np.int64]]: ...

class WordEncoder:
    def __init__(self, vocab: dict[str, int]) -> None: ...
    def encode_batch(
        self,
        texts: Iterable[str | Buffer],
        add_eos: bool,
        dtype: npt.DTypeLike,
        threads: int | None = None,
        replace: bool = False,
        *,
        piece_length: int = ...,
    ) -> tuple[np.ndarray, npt.NDArray[np.int64]]: ...

class WordDecoder:
    def __init__(self, words: Sequence[str], unk_id: int) -> None: ...
    def decode(self, ids: list[int] | np.ndarray, threads: int | None = 1) -> str: ...
    def decode_batch(
        self, ids: np.ndarray, offsets: np.ndarray, threads: int | None = None
    ) -> list[str]: ...

def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...

bpe_unicode_version: str

def bpe_pretokenize(text: str, pattern: str) -> list[str]: ...

class BPEModel:
    def __init__(
        self,
        *,
        tokens: Sequence[bytes],
        merges: npt.NDArray[np.uint32],
        byte_ids: Sequence[int],
        special_ids: Sequence[int],
        ignore_merges: bool,
        ranks_are_ids: bool,
        add_prefix_space: bool,
        pattern: str,
    ) -> None: ...
    def encode(self, text: str, replace: bool) -> list[int]: ...
    def encode_batch(
        self, texts: Sequence[str | bytes], eos_id: int | None, replace: bool, threads: int
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]: ...
    def decode(self, ids: list[int] | npt.NDArray[Any]) -> bytes: ...

class BPECounter:
    def __init__(self, pattern: str, memory: int = ..., folder: str = "") -> None: ...
    def add(
        self,
        texts: Sequence[str],
        replace: bool,
        threads: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...
    def __len__(self) -> int: ...
    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]: ...
    def train(
        self,
        byte_ids: Sequence[int],
        first_free_id: int,
        vocab_size: int,
        min_frequency: int,
        reserved: set[bytes] = ...,
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint32]: ...

def keep_freed_memory(keep: bool) -> bool: ...
def faster_than_own_products() -> str | None: ...

# The kernels of a training step are looked up by name, with the dtype at its end; they take
# addresses, which only tinylm.kernels.compiled passes.
def __getattr__(name: str) -> Callable[..., None]: ...
