# ruff: noqa: N999
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

unicode_version: str

class WordCounter:
    def __init__(self) -> None: ...
    def add(self, texts: Iterable[str], threads: int | None = None) -> None: ...
    def most_common(self, n: int) -> list[str]: ...
    def items(self) -> tuple[list[str], npt.NDArray[np.int64]]: ...

class WordEncoder:
    def __init__(self, vocab: dict[str, int]) -> None: ...
    def encode_batch(
        self,
        texts: Iterable[str],
        add_eos: bool,
        dtype: npt.DTypeLike,
        threads: int | None = None,
    ) -> tuple[np.ndarray, npt.NDArray[np.int64]]: ...
