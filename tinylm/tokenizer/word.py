"""Word-level tokenizer: lower-case, split at white space and punctuation, look each word up."""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from tinylm.errors import InputError
from tinylm.files import write_json
from tinylm.tokenizer import word_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.batches import (
    Errors,
    Text,
    batches,
    check_texts,
    check_threads,
    is_replace,
)
from tinylm.tokenizer.hf_json import read_tokenizer_json
from tinylm.tokenizer.word_reference import EOS, EOS_ID, UNK, UNK_ID

NORMALIZER = {"type": "Lowercase"}
PRE_TOKENIZER = {
    "type": "Split",
    # The same separators as SEPARATORS: Python's \s has \x1c to \x1f, which others' lacks.
    "pattern": {"Regex": r"""[\s\x1c-\x1f.,!?;:"'()]+"""},
    "behavior": "Removed",
    "invert": False,
}


class WordCounter(Protocol):
    """Counts words: `tinylm.tokenizer.word_reference.WordCounter` or the compiled one."""

    def add(self, texts: Iterable[Text], threads: int | None = None, replace: bool = False) -> None:
        """Counts the words of ``texts``; bytes are UTF-8.

        Raises:
            ValueError: some are not, unless ``replace``, which reads them as U+FFFD. Then nothing
                of ``texts`` is counted.
        """

    def most_common(self, n: int) -> list[str]:
        """The ``n`` most frequent words, most frequent first, ties by first appearance."""

    def items(self) -> tuple[list[str], np.ndarray]:
        """All words by first appearance, and their counts (int64)."""


class WordTokenizer:
    """Maps lower-cased words to ids: 0 is ``<UNK>``, any word the vocabulary lacks; 1 is ``<EOS>``.

    Words are the pieces of ``re.split(r'\\s+|[.,!?;:"\\'()]+', text.lower())`` that are not empty.
    Tokenizers never change, can be pickled, and may be used by several threads at once.

    A text is a string, or UTF-8 in bytes or anything that lends them: a bytearray, a memoryview, a
    memory-mapped file. Bytes are read as by ``bytes.decode("utf-8", errors)`` and not copied, so
    nobody should change them meanwhile. ``errors`` says what to do where they are no UTF-8: raise
    (``"strict"``), or read U+FFFD (``"replace"``). Lone surrogates in strings are characters like
    any other, and so is a byte order mark.
    """

    kind = "word"
    unk_id: int | None = UNK_ID
    eos_id = EOS_ID

    def __init__(self, words: Iterable[str]) -> None:
        """``words`` are those after ``<UNK>`` and ``<EOS>``, in the order of their ids from 2.

        Raises:
            InputError: a word is there twice, is a special token, or holds a space.
        """
        self._pieces = [UNK, EOS, *words]
        self._vocab = {piece: i for i, piece in enumerate(self._pieces)}
        if len(self._vocab) != len(self._pieces):
            twice = next(p for i, p in enumerate(self._pieces) if self._vocab[p] != i)
            raise InputError(f"the word {twice!r} is in the vocabulary twice")
        if spaced := next((piece for piece in self._pieces if " " in piece), None):
            raise InputError(f"the word {spaced!r} holds a space, so no text could have it")
        module = compiled()
        encoder = word_reference.WordEncoder if module is None else module.WordEncoder
        self._encoder = encoder(self._vocab)
        decoder = word_reference.WordDecoder if module is None else module.WordDecoder
        self._decoder = decoder(self._pieces, UNK_ID)

    @classmethod
    def train(
        cls,
        texts: Iterable[Text],
        vocab_size: int = 10_000,
        threads: int | None = None,
        errors: Errors = "strict",
    ) -> "WordTokenizer":
        """A tokenizer with the ``vocab_size - 2`` most frequent words of ``texts``.

        Ties are broken by first appearance, so the result does not depend on ``threads`` (None:
        as many as the machine has). The texts are read once and not kept; an open file is a
        sequence of its lines. Memory is in proportion to the number of different words.

        Raises:
            InputError: ``vocab_size`` is below 3, the texts hold no words, or bytes are no UTF-8
                (the message names the text in its batch, and the position).
        """
        _check_vocab_size(vocab_size)
        check_threads(threads)
        replace = is_replace(errors)
        counter = cls.counter()
        for batch in batches(texts):
            with _input_errors():
                counter.add(batch, threads, replace)
        return cls.from_counter(counter, vocab_size)

    @staticmethod
    def counter() -> WordCounter:
        """A new, empty counter of the implementation in use, for `from_counter`."""
        module = compiled()
        counter: WordCounter = (word_reference if module is None else module).WordCounter()
        return counter

    @classmethod
    def from_counter(cls, counter: WordCounter, vocab_size: int = 10_000) -> "WordTokenizer":
        """A tokenizer with the ``vocab_size - 2`` most frequent words. Raises as `train`."""
        _check_vocab_size(vocab_size)
        words = counter.most_common(vocab_size - 2)
        if not words:
            raise InputError("the texts to train on hold no words")
        return cls(words)

    @property
    def vocab_size(self) -> int:
        """How many ids there are; fewer than asked for where the texts had fewer words."""
        return len(self._pieces)

    @property
    def vocab(self) -> dict[str, int]:
        """Every token's id; a copy."""
        return dict(self._vocab)

    def id_to_token(self, token_id: int) -> str:
        """The word of an id; ``<UNK>`` if there is no such id."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else UNK

    def encode(self, text: Text, add_eos: bool = True, errors: Errors = "strict") -> list[int]:
        """The ids of one text, with ``<EOS>`` at the end unless ``add_eos`` is false.

        Raises as `encode_batch`.
        """
        ids, _ = self.encode_batch([text], add_eos, threads=1, errors=errors)
        values: list[int] = ids.tolist()
        return values

    def encode_batch(
        self,
        texts: Iterable[Text],
        add_eos: bool = True,
        threads: int | None = None,
        errors: Errors = "strict",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, and where each text starts in it (int64, n + 1).

        Text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``. The ids are uint16 where every id fits,
        else int32. ``threads`` is how many to use, None as many as the machine has; the result
        is the same for any number, and other Python threads run meanwhile. They share a single
        long text, too.

        Raises:
            InputError: ``texts`` is a single text, ``threads`` is below 1, or bytes are no UTF-8.
        """
        check_texts(texts)
        check_threads(threads)
        replace = is_replace(errors)
        dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        with _input_errors():
            ids, offsets = self._encoder.encode_batch(texts, add_eos, dtype, threads, replace)
        return ids, offsets

    def encode_file(
        self,
        path: str | os.PathLike[str],
        add_eos: bool = True,
        threads: int | None = None,
        errors: Errors = "strict",
    ) -> np.ndarray:
        """The ids of a UTF-8 file as one text, read as it lies on the disk, not into memory.

        Nobody should shorten the file meanwhile.

        Raises:
            InputError: the file cannot be read, or as `encode_batch`.
        """
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped.
                data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
        ids, _ = self.encode_batch([data], add_eos, threads, errors)
        return ids

    def stream_decoder(self) -> "WordStreamDecoder":
        """A decoder for ids that come one at a time."""
        return WordStreamDecoder(self)

    def decode(self, ids: Iterable[int], threads: int | None = 1) -> str:
        """The words of ``ids`` with spaces between; ``<UNK>`` where there is no such id.

        ``ids`` may be a list, an array or a tensor, of integers. Special tokens are not left out.
        ``threads`` is how many to use, None as many as the machine has.

        Raises:
            InputError: ``threads`` is below 1.
        """
        check_threads(threads)
        text: str = self._decoder.decode(_ids_of(ids), threads)
        return text

    def decode_batch(
        self, ids: np.ndarray, offsets: np.ndarray, threads: int | None = None
    ) -> list[str]:
        """What `encode_batch` gave, as texts: `decode` of ``ids[offsets[i]:offsets[i + 1]]``.

        Raises:
            InputError: ``threads`` is below 1, or the offsets do not rise from 0 to at most the
                number of ids.
        """
        check_threads(threads)
        with _input_errors():
            texts: list[str] = self._decoder.decode_batch(ids, offsets, threads)
        return texts

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``tokenizer.json`` that Hugging Face's ``tokenizers`` reads as well.

        There, ids are the same but for three things: a word whose last letter is a capital sigma
        (lower-cased there without regard to its place), letters newer than one side's Unicode,
        and the literal texts ``<UNK>`` and ``<EOS>``, which are special tokens there and words
        here. Its ``decode`` leaves special tokens out unless told otherwise.

        Words with lone surrogates, which JSON cannot carry, are written as code points, such as
        ``" U+0078 U+D800"``: with a space, which no word has. ``tokenizers`` cannot be given text
        that holds such words, so there they just keep their ids.

        Raises:
            InputError: the file cannot be written; what was there before is then untouched.
        """
        write_json(path, _to_json(self._vocab))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WordTokenizer":
        """The tokenizer that `save` wrote to ``path``.

        Raises:
            InputError: the file cannot be read, or is not a word-level tokenizer as `save` writes.
        """
        content = read_tokenizer_json(path)
        try:
            return cls(_words_of(content))
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        return f"WordTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[type["WordTokenizer"], tuple[list[str]]]:
        return type(self), (self._pieces[2:],)


class WordStreamDecoder:
    """Text of ids that come one at a time: each word with the space before it."""

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` adds."""
        return " " + self._tokenizer.id_to_token(token_id)

    def finish(self) -> str:
        """What is left at the end: nothing, as words are whole."""
        return ""


@contextmanager
def _input_errors() -> Iterator[None]:
    """The ValueErrors of both implementations say in one line what is wrong with the input."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def _ids_of(ids: Iterable[int]) -> list[int] | np.ndarray:
    """``ids`` as the decoders take them: an array of integers in one row, or a list."""
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        return ids
    if hasattr(ids, "tolist"):
        return list(ids.tolist())
    return ids if isinstance(ids, list) else list(ids)


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < 3:
        raise InputError(f"vocab_size is {vocab_size}; it must be at least 3: <UNK>, <EOS>, a word")


def _to_json(vocab: Mapping[str, int]) -> dict[str, Any]:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    eos = {"SpecialToken": {"id": EOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": token, **special, "special": True}
            for token, id_ in ((UNK, UNK_ID), (EOS, EOS_ID))
        ],
        "normalizer": NORMALIZER,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, eos],
            "pair": [first, eos, second, eos],
            "special_tokens": {EOS: {"id": EOS, "ids": [EOS_ID], "tokens": [EOS]}},
        },
        "decoder": None,  # joins with spaces
        "model": {
            "type": "WordLevel",
            "vocab": {_to_key(word): i for word, i in vocab.items()},
            "unk_token": UNK,
        },
    }


def _to_key(word: str) -> str:
    """The word as valid Unicode, which keys in ``tokenizer.json`` have to be."""
    if not any("\ud800" <= c <= "\udfff" for c in word):
        return word
    return "".join(f" U+{ord(c):04X}" for c in word)


def _to_word(key: str) -> str:
    if not key.startswith(" "):
        return key
    try:
        return "".join(chr(int(code.removeprefix("U+"), 16)) for code in key.split())
    except (OverflowError, ValueError) as error:
        raise InputError(f"the word {key!r} is not a list of code points") from error


def _words_of(content: Mapping[str, Any]) -> list[str]:
    """The words from id 2 on in the content of a ``tokenizer.json``; checks all the rest of it."""
    model = content["model"]
    if model["type"] != "WordLevel":
        raise InputError(f"the model is of type {model['type']!r}, not 'WordLevel'")
    for key, ours in (("normalizer", NORMALIZER), ("pre_tokenizer", PRE_TOKENIZER)):
        if content.get(key) != ours:
            raise InputError(f"the {key} is not that of tinylm's word tokenizer")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise InputError("the model's vocab does not map words to ids")
    for token, id_ in ((UNK, UNK_ID), (EOS, EOS_ID)):
        if vocab.get(token) != id_:
            raise InputError(f"the special token {token} is missing or its id is not {id_}")
    by_id = {i: _to_word(key) for key, i in vocab.items()}
    if sorted(by_id) != list(range(len(vocab))):
        raise InputError(f"the ids of the {len(vocab)} words are not 0 to {len(vocab) - 1}")
    return [by_id[i] for i in range(2, len(vocab))]
