"""Byte-level BPE tokenizer: any text to ids and exactly back."""

from collections.abc import Iterable, Sequence, Sized
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.tokenizer import bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.batches import (
    Errors,
    Text,
    batches,
    check_texts,
    check_threads,
    is_replace,
    surrogate_error,
    to_text,
    to_texts,
    to_texts_or_bytes,
)
from tinylm.tokenizer.bpe_counter import DEFAULT_MEMORY, BPECounter
from tinylm.tokenizer.bpe_formats import BPEFiles
from tinylm.tokenizer.bpe_json import EOS, BPEVocabulary
from tinylm.tokenizer.bpe_spans import StreamDecoder, check_id, in_characters
from tinylm.tokenizer.bpe_train import check_training, learn_vocabulary
from tinylm.tokenizer.progress import Progress
from tinylm.tokenizer.special_tokens import Choice, Segment, SpecialTokens, is_empty


class BPETokenizer(BPEFiles):
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
        super().__init__(vocabulary)
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
        texts: Iterable[Text],
        vocab_size: int = 10_000,
        min_frequency: int = 2,
        threads: int | None = None,
        errors: Errors = "strict",
        pattern: str = "gpt2",
        *,
        special_tokens: Sequence[str] = (EOS,),
        eos_token: str = EOS,
        memory: int = DEFAULT_MEMORY,
        progress: Progress | None = None,
    ) -> "BPETokenizer":
        """A tokenizer with at most ``vocab_size`` tokens, learnt from ``texts``.

        The pair of tokens with the highest count is merged next, ties by the smaller ids, as
        long as it is seen ``min_frequency`` times: the merges of Hugging Face's ``BpeTrainer``,
        started with all 256 bytes as its ``initial_alphabet``. Unlike there, nothing is merged
        into the name of a special token. Ids are those of ``special_tokens``, in that order, of
        the bytes, and of the merges. The result does not depend on ``threads`` (None: as many as
        the machine has). Too few texts give a smaller vocabulary.

        The texts are read once and not kept. Their distinct pieces are counted in ``memory``
        bytes and, beyond that, on disk; learning from them then takes about 110 bytes of memory
        for each distinct piece.

        Every tenth of a second or so, and at the end of each stage, ``progress`` is called with
        ``"count"``, the characters counted and those in all (None for an iterator), then with
        ``"merge"``, the tokens in the vocabulary and ``vocab_size``. What it raises ends the call.

        Raises:
            InputError: ``vocab_size`` is below 256 and the special tokens, ``pattern`` is
                unknown, ``special_tokens`` lack ``eos_token``, the texts are empty, the disk is
                full, or a text is not UTF-8 or has a lone surrogate and ``errors`` is not
                ``"replace"``, which reads U+FFFD there.
        """
        check_training(vocab_size, min_frequency, special_tokens, eos_token)
        counter = cls.counter(pattern, memory)
        check_texts(texts)
        total = None
        if progress is not None and isinstance(texts, Sized):
            total = sum(len(text) if isinstance(text, Sized) else 0 for text in texts)
        done = 0

        def tell(stage: str, now: int, _: int | None) -> None:
            assert progress is not None
            progress(stage, done + now, total)

        for batch in batches(texts):
            counter.add(batch, threads, errors, None if progress is None else tell)
            done += sum(map(len, batch))
        return cls.from_counter(
            counter,
            vocab_size,
            min_frequency,
            special_tokens=special_tokens,
            eos_token=eos_token,
            progress=progress,
        )

    @staticmethod
    def counter(pattern: str = "gpt2", memory: int = DEFAULT_MEMORY) -> BPECounter:
        """A new counter, for texts that come in batches; then call `from_counter`."""
        return BPECounter(pattern, memory)

    @classmethod
    def from_counter(
        cls,
        counter: BPECounter,
        vocab_size: int = 10_000,
        min_frequency: int = 2,
        *,
        special_tokens: Sequence[str] = (EOS,),
        eos_token: str = EOS,
        progress: Progress | None = None,
    ) -> "BPETokenizer":
        """As `train`, from what ``counter`` has counted."""
        check_training(vocab_size, min_frequency, special_tokens, eos_token)
        return cls(
            learn_vocabulary(
                counter, vocab_size, min_frequency, special_tokens, eos_token, progress
            )
        )

    @property
    def vocab_size(self) -> int:
        """How many ids there are: they are 0 to ``vocab_size - 1``."""
        return len(self._tokens)

    @property
    def add_prefix_space(self) -> bool:
        """Whether a space is put before texts that begin without one."""
        return self._vocabulary.add_prefix_space

    @property
    def vocab(self) -> dict[str, int]:
        """Every token's id, spelled as in ``tokenizer.json``; a copy."""
        return {name: i for i, name in enumerate(self._vocabulary.names) if name}

    def id_to_token(self, token_id: int) -> str:
        """The token as ``tokenizer.json`` spells it, such as ``Ġthe``.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        check_id(token_id, self._tokens)
        return self._vocabulary.names[token_id]

    def encode(
        self,
        text: Text,
        add_eos: bool = False,
        errors: Errors = "strict",
        *,
        allowed_special: Choice = (),
        disallowed_special: Choice = (),
    ) -> list[int]:
        """The ids of one text: a string, or its UTF-8 as bytes or in any buffer.

        The name of a special token in the text is text like any other, unless it is in
        ``allowed_special`` (``"all"``: every one), which makes it that token, or in
        ``disallowed_special`` (``"all"``: every one that is not allowed), which refuses the text.
        What stands between special tokens is encoded like a text of its own.

        Raises:
            InputError: the text has a disallowed special token, or it is not UTF-8 or has a lone
                surrogate and ``errors`` is not ``"replace"``, which reads U+FFFD there.
        """
        replace = is_replace(errors)
        text = to_text(text, errors)
        try:
            if is_empty(allowed_special) and is_empty(disallowed_special):
                ids: list[int] = self._model.encode(text, replace)
            else:
                segments = self._segments(text, allowed_special, disallowed_special, replace)
                ids = [i for segment in segments for i in self._encode_segment(segment, replace)]
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        return [*ids, self.eos_id] if add_eos else ids

    def encode_with_offsets(
        self,
        text: Text,
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
        text = to_text(text, errors)
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
            spans = in_characters(spans, bpe_reference.to_utf8(text, replace))
        return ids, spans

    def encode_batch(
        self,
        texts: Iterable[Text],
        add_eos: bool = False,
        threads: int | None = None,
        errors: Errors = "strict",
        *,
        allowed_special: Choice = (),
        disallowed_special: Choice = (),
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of all texts in one array, and where each text starts in it (int64, n + 1).

        Ids are uint16 if the vocabulary has at most 65,536 tokens, else int32. ``threads`` is
        how many to use (None: as many as the machine has); the result does not depend on it.
        Texts and special tokens are as for `encode`, which also says what is raised.
        """
        replace = is_replace(errors)
        check_threads(threads)
        eos_id = self.eos_id if add_eos else None
        if is_empty(allowed_special) and is_empty(disallowed_special):
            return self._encode_plain(to_texts_or_bytes(texts, errors), eos_id, errors, threads)
        texts = to_texts(texts, errors)
        try:
            segments = [
                self._segments(text, allowed_special, disallowed_special, replace, f"text {i}")
                for i, text in enumerate(texts)
            ]
        except UnicodeEncodeError as error:
            raise surrogate_error(error, texts) from None
        return self._join_segments(segments, eos_id, replace, threads)

    def _encode_plain(
        self, texts: Sequence[str | bytes], eos_id: int | None, errors: Errors, threads: int | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """`encode_batch` of texts in which no special tokens are looked for."""
        try:
            ids, offsets = self._model.encode_batch(texts, eos_id, is_replace(errors), threads or 0)
        except UnicodeDecodeError:  # what `to_texts` replaces, or says where it is
            return self._encode_plain(to_texts(texts, errors), eos_id, errors, threads)
        except UnicodeEncodeError as error:
            raise surrogate_error(error, texts) from None
        return ids, offsets

    def _join_segments(
        self, texts: list[list[Segment]], eos_id: int | None, replace: bool, threads: int | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """`encode_batch` of texts in segments: what is text is encoded as a batch of its own."""
        plain = [text for segments in texts for text, special in segments if special is None]
        ids, bounds = self._model.encode_batch(plain, None, replace, threads or 0)
        end = [] if eos_id is None else [np.array([eos_id], ids.dtype)]
        between = iter(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        parts: list[npt.NDArray[Any]] = [ids[:0]]
        offsets = np.zeros(len(texts) + 1, np.int64)
        for i, segments in enumerate(texts):
            first = len(parts)
            for _, special in segments:
                part = np.array([special]) if special is not None else ids[slice(*next(between))]
                parts.append(part.astype(ids.dtype, copy=False))
            parts += end
            offsets[i + 1] = offsets[i] + sum(map(len, parts[first:]))
        return np.concatenate(parts), offsets

    def _segments(
        self,
        text: str,
        allowed: Choice,
        disallowed: Choice,
        replace: bool,
        where: str = "the text",
    ) -> list[Segment]:
        if not replace:
            text.encode()  # So that an error has the position in the whole text.
        names = self._vocabulary.names
        specials = SpecialTokens({names[i]: i for i in self._vocabulary.special_ids})
        return specials.segments(text, allowed, disallowed, where)

    def _encode_segment(self, segment: Segment, replace: bool) -> list[int]:
        text, special_id = segment
        if special_id is not None:
            return [special_id]
        ids: list[int] = self._model.encode(text, replace)
        return ids

    def _has_prefix(self, segment: Segment) -> bool:
        text, special_id = segment
        is_text = special_id is None and not text.startswith(" ")
        return self.add_prefix_space and is_text

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


def _id_array(ids: Iterable[int]) -> npt.NDArray[Any]:
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"ids must be one row of integers, not of shape {array.shape} and type {array.dtype}"
        )
    # Those are read as they are; the rest become int64.
    dtype = array.dtype if array.dtype in (np.uint16, np.int32) else np.dtype(np.int64)
    return np.ascontiguousarray(array, dtype=dtype)
