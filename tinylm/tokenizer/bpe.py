"""Byte-level BPE tokenizer: any text to ids and exactly back."""

import codecs
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.tokenizer import bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.batches import (
    Errors,
    batches,
    check_texts,
    check_threads,
    is_replace,
    surrogate_error,
)
from tinylm.tokenizer.bpe_counter import BPECounter
from tinylm.tokenizer.bpe_files import (
    read_gpt2,
    read_tiktoken,
    with_merges,
    write_gpt2,
    write_tiktoken,
)
from tinylm.tokenizer.bpe_json import (
    BYTE_TO_CHAR,
    EOS,
    BPEVocabulary,
    read_vocabulary,
    write_vocabulary,
)
from tinylm.tokenizer.special_tokens import Choice, Segment, SpecialTokens

MIN_VOCAB_SIZE = 1 + 256  # the special token and the bytes
MAX_VOCAB_SIZE = 1 << 31  # ids are int32


class StreamDecoder:
    """Decodes ids one at a time and gives out characters only once they are whole."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that ``token_id`` completes; often the empty string in some scripts.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        _check_id(token_id, self._tokens)
        return self._decoder.decode(self._tokens[token_id])

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, else the empty string.

        All that was pushed and this, joined, is what `BPETokenizer.decode` gives for the ids.
        """
        return self._decoder.decode(b"", final=True)


class BPETokenizer:
    """Maps pieces of words to ids; every text has ids, and they decode to exactly that text.

    Text is split by a pattern (letters, numbers and white space as in Unicode 16.0, whatever
    Python runs) and merged within the pieces. The special token ``<|endoftext|>`` ends a text;
    no text becomes a special token by containing its name, unless that is allowed. Tokenizers
    never change, can be pickled, and may be used by several threads at once.

    The patterns, in full in `tinylm.tokenizer.split_patterns`:

    - ``gpt2``: words, numbers and runs of punctuation, each with the space before it.
    - ``cl100k``: GPT-4's. Numbers in groups of three digits, newlines with the punctuation
      before them. ``cl100k_tiktoken`` is the same but for white space at the end of a text,
      which tiktoken leaves whole where `tokenizers` ends a piece at the last newline.
    - ``o200k``: GPT-4o's. Words also end where a capital follows lower-case letters.
    - ``whitespace``: whatever stands between white space, with the space before it.
    """

    kind = "bpe"
    unk_id: int | None = None

    def __init__(self, vocabulary: BPEVocabulary) -> None:
        """Mostly called by `train`, `from_counter` and `load`, which check the vocabulary."""
        self._vocabulary = vocabulary
        self._tokens = vocabulary.tokens()
        self.eos_id = vocabulary.eos_id
        module = compiled()
        model = bpe_reference.BPEModel if module is None else module.BPEModel
        self._model = model(
            tokens=self._tokens,
            merges=vocabulary.merges,
            byte_ids=vocabulary.byte_ids(),
            special_ids=list(vocabulary.special_ids),
            ignore_merges=vocabulary.ignore_merges,
            ranks_are_ids=vocabulary.ranks_are_ids,
            add_prefix_space=vocabulary.add_prefix_space,
            pattern=vocabulary.pattern,
        )

    def __reduce__(self) -> tuple[type["BPETokenizer"], tuple[BPEVocabulary]]:
        return type(self), (self._vocabulary,)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 10_000,
        min_frequency: int = 2,
        threads: int | None = None,
        errors: Errors = "strict",
        pattern: str = "gpt2",
    ) -> "BPETokenizer":
        """A tokenizer with at most ``vocab_size`` tokens, learnt from ``texts``.

        The pair of tokens with the highest count is merged next, ties by the smaller ids, as
        long as it is seen ``min_frequency`` times: the merges of Hugging Face's ``BpeTrainer``.
        The result does not depend on ``threads`` (None: as many as the machine has). The texts
        are read once and not kept. Too few of them give a smaller vocabulary.

        Raises:
            InputError: ``vocab_size`` is below 257, ``pattern`` is unknown, the texts are empty,
                or one has a lone surrogate and ``errors`` is not ``"replace"``, which reads it
                as U+FFFD.
        """
        _check_training(vocab_size, min_frequency)
        check_texts(texts)
        counter = cls.counter(pattern)
        for batch in batches(texts):
            counter.add(batch, threads, errors)
        return cls.from_counter(counter, vocab_size, min_frequency)

    @staticmethod
    def counter(pattern: str = "gpt2") -> BPECounter:
        """A new counter, for texts that come in batches; then call `from_counter`."""
        return BPECounter(pattern)

    @classmethod
    def from_counter(
        cls, counter: BPECounter, vocab_size: int = 10_000, min_frequency: int = 2
    ) -> "BPETokenizer":
        """As `train`, from what ``counter`` has counted."""
        _check_training(vocab_size, min_frequency)
        names = [EOS, *sorted(BYTE_TO_CHAR)]
        byte_ids = [names.index(char) for char in BYTE_TO_CHAR]
        if len(counter) == 0:
            raise InputError("the texts to train a tokenizer on are empty")
        merges = counter.learn_merges(byte_ids, len(names), vocab_size, min_frequency)
        for left, right, result in merges[np.argsort(merges[:, 2], kind="stable")].tolist():
            if result == len(names):
                names.append(names[left] + names[right])
        return cls(
            BPEVocabulary(
                names=names, merges=merges, special_ids=[0], eos_id=0, pattern=counter.pattern
            )
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos_token: str = EOS) -> "BPETokenizer":
        """Reads a byte-level BPE ``tokenizer.json``, whoever wrote it.

        Raises:
            InputError: the file is missing or broken, lacks the special token ``eos_token``, or
                asks for something this class does not do (a normalizer, another pre-tokenizer).
        """
        return cls(read_vocabulary(path, eos_token))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``tokenizer.json`` that Hugging Face ``tokenizers`` reads too. Atomic.

        Raises:
            InputError: the tokenizer comes from a rank file so odd that no list of merges gives
                its ids.
        """
        write_vocabulary(with_merges(self._vocabulary), path)

    @classmethod
    def load_tiktoken(
        cls,
        path: str | os.PathLike[str],
        *,
        pattern: str,
        special_tokens: Mapping[str, int],
        eos_token: str = EOS,
    ) -> "BPETokenizer":
        """Reads a rank file of tiktoken, such as ``cl100k_base.tiktoken``.

        The file holds tokens and their ids only, so ``pattern`` and the ids of the special tokens
        must be given: for that file ``"cl100k_tiktoken"`` and ``{"<|endoftext|>": 100257, ...}``.
        Ids are those of ``tiktoken.Encoding`` with the same arguments. Ids that no token has
        count in `vocab_size`, but cannot be decoded.

        Raises:
            InputError: the file is missing or broken (the line is named), or an argument does not
                fit it.
        """
        return cls(read_tiktoken(path, pattern, special_tokens, eos_token))

    def save_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Writes a rank file for tiktoken; special tokens and the pattern are not in it. Atomic.

        Raises:
            InputError: tiktoken would give other ids than this tokenizer.
        """
        write_tiktoken(self._vocabulary, path)

    @classmethod
    def load_gpt2(
        cls,
        vocab_path: str | os.PathLike[str],
        merges_path: str | os.PathLike[str],
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (EOS,),
        eos_token: str = EOS,
    ) -> "BPETokenizer":
        """Reads ``vocab.json`` and ``merges.txt``, the files that GPT-2 was published with.

        They do not say which tokens are special, so ``special_tokens`` does.

        Raises:
            InputError: a file is missing or broken (of ``merges.txt`` the line is named), or
                lacks a special token.
        """
        vocabulary = read_gpt2(vocab_path, merges_path, pattern, special_tokens, eos_token)
        return cls(vocabulary)

    def save_gpt2(
        self, vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str]
    ) -> None:
        """Writes ``vocab.json`` and ``merges.txt``, each atomically; the pattern is in neither.

        Raises:
            InputError: these files cannot say what this tokenizer does: some token is reached by
                no merges, or a space is put before texts.
        """
        write_gpt2(self._vocabulary, vocab_path, merges_path)

    @property
    def vocab_size(self) -> int:
        """How many ids there are: they are 0 to ``vocab_size - 1``."""
        return len(self._tokens)

    @property
    def vocab(self) -> dict[str, int]:
        """Every token's id, spelled as in ``tokenizer.json``; a copy."""
        return {name: i for i, name in enumerate(self._vocabulary.names) if name}

    def id_to_token(self, token_id: int) -> str:
        """The token as ``tokenizer.json`` spells it, such as ``Ġthe``.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        _check_id(token_id, self._tokens)
        return self._vocabulary.names[token_id]

    def encode(
        self,
        text: str,
        add_eos: bool = False,
        errors: Errors = "strict",
        *,
        allowed_special: Choice = (),
        disallowed_special: Choice = (),
    ) -> list[int]:
        """The ids of one text.

        The name of a special token in the text is text like any other, unless it is in
        ``allowed_special`` (``"all"``: every one), which makes it that token, or in
        ``disallowed_special`` (``"all"``: every one that is not allowed), which refuses the text.
        What stands between special tokens is encoded like a text of its own.

        Raises:
            InputError: the text has a disallowed special token, or a lone surrogate and
                ``errors`` is not ``"replace"``, which reads it as U+FFFD.
        """
        replace = is_replace(errors)
        try:
            if _is_none(allowed_special) and _is_none(disallowed_special):
                ids: list[int] = self._model.encode(text, replace)
            else:
                segments = self._segments(text, allowed_special, disallowed_special, replace)
                ids = [i for segment in segments for i in self._encode_segment(segment, replace)]
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        return [*ids, self.eos_id] if add_eos else ids

    def encode_with_offsets(
        self,
        text: str,
        unit: Literal["characters", "bytes"] = "characters",
        errors: Errors = "strict",
        *,
        allowed_special: Choice = (),
        disallowed_special: Choice = (),
    ) -> tuple[list[int], npt.NDArray[np.int64]]:
        """The ids of one text as by `encode`, and a row of each id's start and end in the text.

        In bytes of its UTF-8, ends are the next starts. In characters, a token that holds but a
        part of a character spans it all, so tokens that share one overlap. A space that is put
        before the text takes no place. Raises as `encode`.
        """
        if unit not in ("characters", "bytes"):
            raise InputError(f"unit is {unit!r}; it must be 'characters' or 'bytes'")
        replace = is_replace(errors)
        ids: list[int] = []
        lengths: list[int] = []  # in the text, in bytes
        try:
            for segment in self._segments(text, allowed_special, disallowed_special, replace):
                new = self._encode_segment(segment, replace)
                ids += new
                start = len(lengths)
                lengths += [len(self._tokens[i]) for i in new]
                lengths[start] -= self._has_prefix(segment)
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        bounds = np.cumsum([0, *lengths], dtype=np.int64)
        spans = np.stack([bounds[:-1], bounds[1:]], axis=1)
        if unit == "characters":
            spans = _in_characters(spans, bpe_reference.to_utf8(text, replace))
        return ids, spans

    def encode_batch(
        self,
        texts: Sequence[str],
        add_eos: bool = False,
        threads: int | None = None,
        errors: Errors = "strict",
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of all texts in one array, and where each text starts in it (int64, n + 1).

        Ids are uint16 if the vocabulary has at most 65,536 tokens, else int32. ``threads`` is
        how many to use (None: as many as the machine has); the result does not depend on it.
        Names of special tokens in the texts are text.

        Raises:
            InputError: a text has a lone surrogate and ``errors`` is not ``"replace"``, which
                reads it as U+FFFD.
        """
        replace = is_replace(errors)
        check_texts(texts)
        check_threads(threads)
        eos_id = self.eos_id if add_eos else None
        try:
            ids, offsets = self._model.encode_batch(texts, eos_id, replace, threads or 0)
        except UnicodeEncodeError as error:
            raise surrogate_error(error, texts) from None
        return ids, offsets

    def _segments(
        self, text: str, allowed: Choice, disallowed: Choice, replace: bool
    ) -> list[Segment]:
        if not replace:
            text.encode()  # So that an error has the position in the whole text.
        names = self._vocabulary.names
        specials = SpecialTokens({names[i]: i for i in self._vocabulary.special_ids})
        return specials.segments(text, allowed, disallowed)

    def _encode_segment(self, segment: Segment, replace: bool) -> list[int]:
        text, special_id = segment
        if special_id is not None:
            return [special_id]
        ids: list[int] = self._model.encode(text, replace)
        return ids

    def _has_prefix(self, segment: Segment) -> bool:
        text, special_id = segment
        is_text = special_id is None and not text.startswith(" ")
        return self._vocabulary.add_prefix_space and is_text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, with U+FFFD where their bytes are not UTF-8.

        Special tokens appear by name. For the text of some ids of a longer sequence, see
        `stream_decoder`.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``, which need not be whole characters. Raises as `decode`."""
        try:
            return bytes(self._model.decode(ids if isinstance(ids, list) else _id_array(ids)))
        except IndexError as error:
            raise InputError(str(error)) from None
        except TypeError as error:
            raise InputError(f"ids must be one row of integers: {error}") from None

    def stream_decoder(self) -> StreamDecoder:
        """A decoder to which ids are pushed one at a time."""
        return StreamDecoder(self._tokens)


def _check_training(vocab_size: int, min_frequency: int) -> None:
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE} (256 bytes and "
            f"{EOS}) and at most {MAX_VOCAB_SIZE}"
        )
    if min_frequency < 1:
        raise InputError(f"min_frequency is {min_frequency}; it must be at least 1")


def _check_id(token_id: int, tokens: Sequence[bytes]) -> None:
    if not 0 <= token_id < len(tokens) or not tokens[token_id]:
        raise InputError(f"id {token_id} is not in the vocabulary of {len(tokens)}")


def _is_none(choice: Choice) -> bool:
    return not isinstance(choice, str) and len(choice) == 0


def _in_characters(spans: npt.NDArray[np.int64], utf8: bytes) -> npt.NDArray[np.int64]:
    """Spans of bytes as the characters that they touch."""
    is_first = (np.frombuffer(utf8, dtype=np.uint8) & 0xC0) != 0x80
    before = np.concatenate([[0], np.cumsum(is_first)])  # how many begin before each byte
    starts, ends = spans.T
    # A start inside a character goes back to the one that has begun.
    inside = np.append(~is_first, False)[starts]
    return np.stack([before[starts] - inside, before[ends]], axis=1)


def _id_array(ids: Iterable[int]) -> npt.NDArray[np.int64]:
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"ids must be one row of integers, not of shape {array.shape} and type {array.dtype}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)
