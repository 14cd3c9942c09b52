"""Byte-level BPE in plain Python: the specification of the C++ one, and its fallback."""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tinylm.tokenizer import unicode_classes
from tinylm.tokenizer.split_patterns import REGEX

# Text comes in few distinct pieces; beyond so many cached ones memory matters more than time.
MAX_CACHED_PIECES = 1 << 17

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SURROGATE = re.compile("[\ud800-\udfff]")


def _class_body(*classes: str) -> str:
    """Ranges as they stand inside the brackets of a regular expression."""
    body = []
    for item in " ".join(classes).split():
        ends, _, step = item.partition("/")
        first, last = (int(end, 16) for end in ends.split("-"))
        if step:
            body += [f"\\U{code:08x}" for code in range(first, last + 1, int(step))]
        else:
            body.append(f"\\U{first:08x}-\\U{last:08x}")
    return "".join(body)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The published pattern for ``re``, which has no Unicode classes: they are spelled out.

    Possessive quantifiers (Python 3.11) become plain ones. They are there for speed: nothing that
    follows them in a pattern could match what they took.
    """
    upper, lower = unicode_classes.UPPER, unicode_classes.LOWER
    uncased, mark = unicode_classes.UNCASED, unicode_classes.MARK
    bodies = {
        r"\p{L}": _class_body(upper, lower, uncased),
        r"\p{N}": _class_body(unicode_classes.NUMBER),
        r"\p{M}": _class_body(mark),
        r"\p{Lu}\p{Lt}": _class_body(upper),
        r"\p{Ll}": _class_body(lower),
        r"\p{Lm}\p{Lo}": _class_body(uncased),
        r"\s": _class_body(unicode_classes.SPACE),
    }

    def spell_out(found: re.Match[str]) -> str:
        part = found[0]
        if part == r"\S":
            return "[^" + bodies[r"\s"] + "]"
        if part in bodies:
            return f"[{bodies[part]}]"
        for name, body in bodies.items():
            part = part.replace(name, body)
        return part

    plain = re.sub(r"([+*?])\+", r"\1", REGEX[pattern])
    return re.compile(re.sub(r"\[[^]]*\]|\\p\{L\}|\\p\{N\}|\\[sS]", spell_out, plain))


def pretokenize(text: str, pattern: str) -> list[str]:
    """The pieces of ``text`` within which BPE may merge; joined, they are ``text``.

    ``pattern`` is a name from `tinylm.tokenizer.split_patterns`.
    """
    return _compiled(pattern).findall(text)


def to_utf8(text: str, replace: bool) -> bytes:
    """UTF-8 of ``text``; a lone surrogate becomes U+FFFD or raises ``UnicodeEncodeError``."""
    return (SURROGATE.sub(REPLACEMENT, text) if replace else text).encode()


def merge_piece(ids: Sequence[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merges, again and again, the leftmost pair of lowest rank; n log n.

    ``merges`` maps a pair to its rank and the id that replaces it.
    """
    symbols = list(ids)
    following = list(range(1, len(symbols) + 1))
    previous = list(range(-1, len(symbols) - 1))
    alive = [True] * len(symbols)
    heap: list[tuple[int, int, int, int]] = []

    def push(i: int) -> None:
        if i >= 0 and following[i] < len(symbols):
            pair = symbols[i], symbols[following[i]]
            if pair in merges:
                heapq.heappush(heap, (merges[pair][0], i, *pair))

    for i in range(len(symbols)):
        push(i)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = following[i]
        if not (alive[i] and j < len(symbols) and (symbols[i], symbols[j]) == (left, right)):
            continue
        symbols[i] = merges[left, right][1]
        alive[j] = False
        following[i] = following[j]
        if following[i] < len(symbols):
            previous[following[i]] = i
        push(previous[i])
        push(i)
    return [symbol for symbol, lives in zip(symbols, alive, strict=True) if lives]


class BPEModel:
    """A fixed vocabulary. Arguments as in ``tinylm._C.BPEModel``."""

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
    ) -> None:
        self._tokens = list(tokens)
        self._merges = {
            (left, right): (result if ranks_are_ids else rank, result)
            for rank, (left, right, result) in enumerate(merges.tolist())
        }
        self._byte_ids = list(byte_ids)
        self._whole_pieces: dict[bytes, int] = {}
        if ignore_merges:
            special = set(special_ids)
            self._whole_pieces = {
                token: i for i, token in enumerate(self._tokens) if i not in special
            }
        self._add_prefix_space = add_prefix_space
        self._pattern = pattern
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, replace: bool) -> list[int]:
        """Ids of ``text``; ``replace`` as in `to_utf8`."""
        text = to_utf8(text, replace).decode()
        if self._add_prefix_space and text and not text.startswith(" "):
            text = " " + text
        ids: list[int] = []
        for piece in pretokenize(text, self._pattern):
            ids.extend(self._encode_piece(piece))
        return ids

    def encode_batch(
        self, texts: Sequence[str | bytes], eos_id: int | None, replace: bool, threads: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Ids of all texts, each ended by ``eos_id`` if any, and where each text's ids start.

        ``UnicodeDecodeError`` if bytes are not UTF-8.
        """
        dtype = np.uint16 if len(self._tokens) <= 1 << 16 else np.int32
        end = [] if eos_id is None else [eos_id]
        read = [text.decode() if isinstance(text, bytes) else text for text in texts]
        parts = [np.array(self.encode(text, replace) + end, dtype=dtype) for text in read]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return np.concatenate([np.empty(0, dtype), *parts]), offsets

    def decode(self, ids: list[int] | npt.NDArray[np.int64]) -> bytes:
        """Bytes of ``ids``; ``IndexError`` if one is not in the vocabulary."""
        parts: list[bytes] = []
        for position, token_id in enumerate(ids if isinstance(ids, list) else ids.tolist()):
            if not 0 <= token_id < len(self._tokens) or not self._tokens[token_id]:
                raise IndexError(
                    f"id {token_id} at position {position} is not in the vocabulary of "
                    f"{len(self._tokens)}"
                )
            parts.append(self._tokens[token_id])
        return b"".join(parts)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._cache.get(piece)
        if ids is None:
            piece_bytes = piece.encode()
            if piece_bytes in self._whole_pieces:
                ids = [self._whole_pieces[piece_bytes]]
            else:
                ids = merge_piece([self._byte_ids[byte] for byte in piece_bytes], self._merges)
            if len(self._cache) >= MAX_CACHED_PIECES:
                self._cache.clear()
            self._cache[piece] = ids
        return ids


Tell = Callable[[int, int], None]  # what is done, and of how much


class BPECounter:
    """Counts pieces of texts and learns merges from them."""

    def __init__(self, pattern: str, memory: int | None = None, folder: str = "") -> None:
        """``memory`` and ``folder`` say nothing here: all is kept in memory."""
        self._pattern = pattern
        self._counts: Counter[bytes] = Counter()

    def add(
        self, texts: Sequence[str], replace: bool, threads: int, progress: Tell | None = None
    ) -> None:
        """Counts the pieces of ``texts``; none of them if one has a lone surrogate."""
        encodable = [to_utf8(text, replace).decode() for text in texts]
        total, done = sum(map(len, encodable)), 0
        for text in encodable:
            self._counts.update(piece.encode() for piece in pretokenize(text, self._pattern))
            done += len(text)
            if progress is not None:
                progress(done, total)

    def __len__(self) -> int:
        """How many distinct pieces there are."""
        return len(self._counts)

    def items(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """All pieces in the order of their bytes, and their counts."""
        pieces = sorted(self._counts)
        return pieces, np.array([self._counts[piece] for piece in pieces], dtype=np.int64)

    def train(
        self,
        byte_ids: Sequence[int],
        first_free_id: int,
        vocab_size: int,
        min_frequency: int,
        reserved: Collection[bytes] = (),
        progress: Tell | None = None,
    ) -> npt.NDArray[np.uint32]:
        """Merges as rows of left, right and result, in order.

        The pair with the highest count is merged next; ties go to the smaller left id, then to
        the smaller right id; pairs seen less often than ``min_frequency`` are not merged. When
        the joined bytes are those of an existing token, that token is the result and the
        vocabulary does not grow; when they are ``reserved``, the pair is passed over. Without
        reserved ones these are the merges of Hugging Face tokenizers' BpeTrainer.
        """
        trainer = _Trainer(self._counts, byte_ids, first_free_id)
        merges = trainer.run(vocab_size, max(1, min_frequency), reserved, progress)
        return np.array(merges, dtype=np.uint32).reshape(-1, 3)


Pair = tuple[int, int]


class _Trainer:
    def __init__(self, counts: Counter[bytes], byte_ids: Sequence[int], first_free_id: int) -> None:
        self._words = [[byte_ids[byte] for byte in piece] for piece in counts]
        self._word_counts = list(counts.values())
        self._spelling = {byte_ids[byte]: bytes([byte]) for byte in range(256)}
        self._ids = {spelling: token_id for token_id, spelling in self._spelling.items()}
        self._next_id = first_free_id
        self._pair_counts: Counter[Pair] = Counter()
        self._new_pairs: defaultdict[Pair, set[int]] = defaultdict(set)
        # Entries are (-count, pair, words): the smallest has the highest count, then smallest pair.
        self._queue: list[tuple[int, Pair, set[int]]] = []
        for word, symbols in enumerate(self._words):
            for pair in pairwise(symbols):
                self._change(pair, word, +1)
        self._push_new_pairs()

    def run(
        self,
        vocab_size: int,
        min_frequency: int,
        reserved: Collection[bytes],
        progress: Tell | None,
    ) -> list[tuple[int, int, int]]:
        merges: list[tuple[int, int, int]] = []
        while self._next_id < vocab_size and self._queue:
            if progress is not None:
                progress(self._next_id, vocab_size)
            negative_count, pair, words = heapq.heappop(self._queue)
            count = self._pair_counts[pair]
            if count != -negative_count:
                heapq.heappush(self._queue, (-count, pair, words))
                continue
            if count < min_frequency:
                break
            if self._spelling[pair[0]] + self._spelling[pair[1]] in reserved:
                continue
            result = self._id_of_joined(pair)
            merges.append((*pair, result))
            for word in words:
                self._merge_in_word(word, pair, result)
            self._push_new_pairs()
        return merges

    def _change(self, pair: Pair, word: int, sign: int) -> None:
        self._pair_counts[pair] += sign * self._word_counts[word]
        if sign > 0:
            self._new_pairs[pair].add(word)

    def _merge_in_word(self, word: int, pair: Pair, result: int) -> None:
        symbols, merged = self._words[word], list[int]()
        i = 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) != pair:
                merged.append(symbols[i])
                i += 1
                continue
            if merged:
                self._change((merged[-1], pair[0]), word, -1)
                self._change((merged[-1], result), word, +1)
            merged.append(result)
            i += 2
            if i < len(symbols):
                self._change((pair[1], symbols[i]), word, -1)
                self._change((result, symbols[i]), word, +1)
        self._words[word] = merged

    def _id_of_joined(self, pair: Pair) -> int:
        spelling = self._spelling[pair[0]] + self._spelling[pair[1]]
        if spelling not in self._ids:
            self._ids[spelling] = self._next_id
            self._spelling[self._next_id] = spelling
            self._next_id += 1
        return self._ids[spelling]

    def _push_new_pairs(self) -> None:
        for pair, words in self._new_pairs.items():
            if self._pair_counts[pair] > 0:
                heapq.heappush(self._queue, (-self._pair_counts[pair], pair, words))
        self._new_pairs.clear()
