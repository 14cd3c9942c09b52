"""The word tokenizer in plain Python: the specification of the C++ one, and its fallback."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

SEPARATORS = re.compile(r"\s+|[.,!?;:\"'()]+")
UNK, EOS = "<UNK>", "<EOS>"
UNK_ID, EOS_ID = 0, 1


def split_words(text: str) -> list[str]:
    """Lower-cased words of ``text``, without separators and empties."""
    return [word for word in SEPARATORS.split(text.lower()) if word]


class WordCounter:
    """Counts words of any number of texts; remembers the order of first appearance."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, texts: Sequence[str], threads: int | None = None) -> None:
        """Counts the words of ``texts``. ``threads`` is there for the compiled version."""
        for text in texts:
            self._counts.update(split_words(text))

    def most_common(self, n: int) -> list[str]:
        """The ``n`` most frequent words, most frequent first, ties by first appearance."""
        return [word for word, _ in self._counts.most_common(n)]

    def items(self) -> tuple[list[str], np.ndarray]:
        """All words by first appearance, and their counts (int64)."""
        return list(self._counts), np.fromiter(
            self._counts.values(), dtype=np.int64, count=len(self._counts)
        )


class WordEncoder:
    """Maps words to ids by a fixed vocabulary; unknown words become ``UNK_ID``."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self._vocab = dict(vocab)

    def encode_batch(
        self, texts: Iterable[str], add_eos: bool, dtype: np.dtype, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, and each text's start in it (int64, n + 1)."""
        ids: list[int] = []
        offsets = [0]
        for text in texts:
            ids.extend(self._vocab.get(word, UNK_ID) for word in split_words(text))
            if add_eos:
                ids.append(EOS_ID)
            offsets.append(len(ids))
        return np.array(ids, dtype=dtype), np.array(offsets, dtype=np.int64)
