"""The word tokenizer in plain Python: the specification of the C++ one, and its fallback."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from tinylm.tokenizer.batches import Text

SEPARATORS = re.compile(r"\s+|[.,!?;:\"'()]+")
UNK, EOS = "<UNK>", "<EOS>"
UNK_ID, EOS_ID = 0, 1


def split_words(text: str) -> list[str]:
    """Lower-cased words of ``text``, without separators and empties."""
    return [word for word in SEPARATORS.split(text.lower()) if word]


def as_str(text: Text, index: int, replace: bool) -> str:
    """``text``, which is number ``index`` of its batch, as a string; bytes are UTF-8.

    Raises:
        TypeError: it is neither a string nor a row of bytes.
        ValueError: it is not UTF-8, unless ``replace``, which reads such bytes as U+FFFD.
    """
    if isinstance(text, str):
        return text
    try:
        view = memoryview(text)
    except TypeError:
        kind = type(text).__name__
        raise TypeError(f"texts[{index}] is of type {kind}, not str or bytes") from None
    with view:
        if view.itemsize != 1 or view.ndim > 1:
            kind = type(text).__name__
            raise TypeError(f"texts[{index}] is of type {kind}, but not a row of bytes")
        raw = bytes(view)
    try:
        return raw.decode("utf-8", "replace" if replace else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {index} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; "
            "pass errors='replace' to read such bytes as U+FFFD"
        ) from None


class WordCounter:
    """Counts words of any number of texts; remembers the order of first appearance."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, texts: Iterable[Text], threads: int | None = None, replace: bool = False) -> None:
        """Counts the words of ``texts``, of all or, if one cannot be read, of none.

        ``threads`` is there for the compiled version. Raises as `as_str`.
        """
        for text in [as_str(text, i, replace) for i, text in enumerate(texts)]:
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
        self,
        texts: Iterable[Text],
        add_eos: bool,
        dtype: np.dtype,
        threads: int | None = None,
        replace: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, and each text's start in it (int64, n + 1).

        Raises as `as_str`.
        """
        ids: list[int] = []
        offsets = [0]
        for i, text in enumerate(texts):
            words = split_words(as_str(text, i, replace))
            ids.extend(self._vocab.get(word, UNK_ID) for word in words)
            if add_eos:
                ids.append(EOS_ID)
            offsets.append(len(ids))
        return np.array(ids, dtype=dtype), np.array(offsets, dtype=np.int64)


class WordDecoder:
    """Words of ids, joined by spaces; an id without a word has that of ``unk_id``."""

    def __init__(self, words: Sequence[str], unk_id: int) -> None:
        self._words = list(words)
        self._unk = self._words[unk_id]

    def decode(self, ids: list[int] | np.ndarray, threads: int | None = None) -> str:
        """The text of ``ids``, which are integers. ``threads`` is for the compiled version."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else ids
        words, unk = self._words, self._unk
        if values and (min(values) < 0 or max(values) >= len(words)):
            return " ".join([words[i] if 0 <= i < len(words) else unk for i in values])
        return " ".join(map(words.__getitem__, values))

    def decode_batch(
        self, ids: np.ndarray, offsets: np.ndarray, threads: int | None = None
    ) -> list[str]:
        """A text for each two neighbours of ``offsets``, of the ids between.

        Raises:
            ValueError: the offsets do not rise from 0 to at most the number of ids.
        """
        bounds = offsets.tolist()
        for i, at in enumerate(bounds):
            if at < (bounds[i - 1] if i > 0 else 0) or at > len(ids):
                raise ValueError(
                    f"offsets[{i}] is {at}; offsets must rise from 0 to at most the number of "
                    f"ids, {len(ids)}"
                )
        return [self.decode(ids[a:b]) for a, b in pairwise(bounds)]
