"""The two readings of a corpus: words or pairs are counted, then its splits become token files."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tinylm.data.progress import Stage
from tinylm.data.sources import Source
from tinylm.data.splits import is_validation, to_bytes
from tinylm.data.tokens import OFFSET_DTYPE, token_dtype
from tinylm.errors import InputError
from tinylm.files import atomic_write
from tinylm.spelling import SpellingModel
from tinylm.tokenizer import Tokenizer, WordTokenizer
from tinylm.tokenizer.word import WordCounter

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits.

    Attributes:
        data: what is split, or all of training if there is ``valid``; ``None``: no training.
        valid: the source of the validation split; ``None``: a share of ``data``.
        valid_fraction: that share.
    """

    data: Source | None
    valid: Source | None
    valid_fraction: float

    @property
    def sources(self) -> list[Source]:
        return [source for source in (self.data, self.valid) if source is not None]

    def documents(self, splits: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
        """Split, text and size in UTF-8 bytes of each document, blank ones left out.

        Sources that hold nothing of ``splits`` are not read.
        """
        if self.data is not None:
            for text, data in _filled(self.data):
                held_out = self.valid is None and is_validation(data, self.valid_fraction)
                yield "valid" if held_out else "train", text, len(data)
        if self.valid is not None and "valid" in splits:
            for text, data in _filled(self.valid):
                yield "valid", text, len(data)

    def check(self, documents: dict[str, int]) -> None:
        """Raises `InputError` if one of the splits got no document."""
        empty = [name for name, count in documents.items() if count == 0]
        if not empty:
            return
        names = " and ".join(source.name for source in self.sources)
        if len(empty) == len(documents):
            raise InputError(f"{names}: the corpus is empty; it needs documents with text in them")
        if self.data is not None and self.valid is not None:
            source = self.data if empty == ["train"] else self.valid
            raise InputError(f"{source.name}: the corpus is empty; it needs documents with text")
        change = "raise" if empty == ["valid"] else "lower"
        raise InputError(
            f"{names}: none of the {sum(documents.values())} documents falls into the {empty[0]}"
            f" split; {change} valid_fraction ({self.valid_fraction}), give more documents, or name"
            " a second source as valid"
        )


def _filled(source: Source) -> Iterator[tuple[str, bytes]]:
    for text in source.documents():
        if text and not text.isspace():
            yield text, to_bytes(text)


class _Batches:
    """Gathers the documents of one split and hands them on some megabytes at a time."""

    def __init__(self, consume: Callable[[list[str]], None], stage: Stage) -> None:
        self._consume, self._stage = consume, stage
        self._texts: list[str] = []
        self._bytes = 0

    def add(self, text: str, size: int) -> None:
        self._texts.append(text)
        self._bytes += size
        if self._bytes >= _BATCH_BYTES or len(self._texts) >= _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        if self._texts:
            self._consume(self._texts)
            self._stage.advance(len(self._texts), self._bytes)
        self._texts, self._bytes = [], 0


def count_training(corpus: Corpus, counter: Any, stage: Stage) -> None:
    """Feeds the training split to ``counter.add``, in batches of some megabytes.

    Raises:
        InputError: a split gets no document.
    """
    splits = ("train",) if corpus.valid is not None else ("train", "valid")
    documents = dict.fromkeys(splits, 0)
    batches = _Batches(counter.add, stage)
    for split, text, size in corpus.documents(("train",)):
        documents[split] += 1
        if split == "train":
            batches.add(text, size)
    batches.flush()
    corpus.check(documents)


def word_costs(
    counter: WordCounter, tokenizer: WordTokenizer, spelling: SpellingModel | None
) -> dict[str, Any]:
    """What the words of a split cost: ``word_bytes`` in all, ``unk_bits`` of unknown ones."""
    words, counts = counter.items()
    sizes = np.fromiter((len(to_bytes(word)) for word in words), np.int64, len(words))
    unknown, unknown_counts = unknown_words(counter, tokenizer)
    bits = None if spelling is None else float((spelling.bits(unknown) * unknown_counts).sum())
    return {"word_bytes": int(sizes @ counts), "unk_bits": bits}


def unknown_words(
    counter: WordCounter, tokenizer: WordTokenizer
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The counted words outside the vocabulary, by first appearance, and their counts."""
    words, counts = counter.items()
    vocab = tokenizer.vocab
    places = [i for i, word in enumerate(words) if word not in vocab]
    return [words[i] for i in places], counts[places]


class SplitWriter:
    """Encodes the documents of one split into its two files.

    Each document ends with ``<EOS>`` if ``document_eos``, all of them if ``stream_eos``.

    Attributes:
        documents, tokens, unk_tokens: how many there are so far.
        wordless: documents without a token of their own.
    """

    def __init__(
        self,
        ids: IO[bytes],
        offsets: IO[bytes],
        tokenizer: Tokenizer,
        document_eos: bool,
        stream_eos: bool,
    ) -> None:
        self._ids, self._offsets = ids, offsets
        self._tokenizer = tokenizer
        self._document_eos, self._stream_eos = document_eos, stream_eos
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.documents = self.tokens = self.unk_tokens = self.wordless = 0

    def add(self, texts: list[str]) -> None:
        """Encodes and writes ``texts``.

        Raises:
            InputError: the tokenizer cannot encode a text, or the disk is full.
        """
        ids, offsets = self._tokenizer.encode_batch(texts, add_eos=self._document_eos)
        self._write_offsets(offsets[:-1] + self.tokens)
        self._write(ids)
        self.documents += len(texts)
        self.wordless += int((np.diff(offsets) == int(self._document_eos)).sum())

    @contextmanager
    def document(self) -> Iterator[None]:
        """One document, which the block gives to `add_parts`."""
        begin = self.tokens
        self._write_offsets(np.array([begin]))
        yield
        self.documents += 1
        self.wordless += self.tokens == begin
        if self._document_eos:
            self._write(np.array([self._tokenizer.eos_id]))

    def add_parts(self, parts: list[str], threads: int | None = None) -> None:
        """Encodes and writes parts of a document that go on as `tinylm.tokenizer.cuts` cuts."""
        self._write(self._tokenizer.encode_batch(parts, add_eos=False, threads=threads)[0])

    def finish(self) -> None:
        """Ends the stream, and the last document."""
        if self._stream_eos:
            self._write(np.array([self._tokenizer.eos_id]))
        self._write_offsets(np.array([self.tokens]))

    def _write(self, ids: npt.NDArray[np.integer]) -> None:
        self._ids.write(ids.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(ids)
        if self._tokenizer.unk_id is not None:
            self.unk_tokens += int((ids == self._tokenizer.unk_id).sum())

    def _write_offsets(self, offsets: npt.NDArray[np.integer]) -> None:
        self._offsets.write(offsets.astype(OFFSET_DTYPE).tobytes())

    @property
    def word_gaps(self) -> int:
        """Spaces it takes to join the words of each document, once finished."""
        ends = self.documents if self._document_eos else 1
        return self.tokens - ends - (self.documents - self.wordless)


@contextmanager
def split_writer(
    folder: Path,
    split: str,
    tokenizer: Tokenizer,
    document_eos: bool,
    stream_eos: bool | None = None,
) -> Iterator[SplitWriter]:
    """Yields the writer of ``SPLIT.bin`` and ``SPLIT.docs``, which appear if the block succeeds.

    ``stream_eos`` is, if None, the opposite of ``document_eos``.
    """
    stream_eos = not document_eos if stream_eos is None else stream_eos
    with (
        atomic_write(folder / f"{split}.bin") as ids,
        atomic_write(folder / f"{split}.docs") as docs,
    ):
        writer = SplitWriter(ids, docs, tokenizer, document_eos, stream_eos)
        yield writer
        writer.finish()


def encode_corpus(
    corpus: Corpus,
    folder: Path,
    tokenizer: Tokenizer,
    splits: tuple[str, ...],
    costs: dict[str, dict[str, Any]],
    spelling: SpellingModel | None,
    document_eos: bool,
    stage: Stage,
) -> dict[str, dict[str, Any]]:
    """Writes the token files of ``splits`` and returns what ``meta.json`` says of each.

    ``costs`` holds the `word_costs` of splits whose words were counted before; those of the other
    splits are counted here.

    Raises:
        InputError: a split gets no document, a text cannot be encoded, the disk is full.
    """
    text_bytes = dict.fromkeys(splits, 0)
    counters: dict[str, WordCounter] = {}
    if isinstance(tokenizer, WordTokenizer):
        counters = {name: tokenizer.counter() for name in splits if name not in costs}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(split_writer(folder, name, tokenizer, document_eos))
            for name in splits
        }

        def consumer(name: str) -> Callable[[list[str]], None]:
            def consume(texts: list[str]) -> None:
                writers[name].add(texts)
                if name in counters:
                    counters[name].add(texts)

            return consume

        batches = {name: _Batches(consumer(name), stage) for name in splits}
        for name, text, size in corpus.documents(splits):
            text_bytes[name] += size
            batches[name].add(text, size)
        for batch in batches.values():
            batch.flush()
        corpus.check({name: writer.documents for name, writer in writers.items()})
    for name, counter in counters.items():
        assert isinstance(tokenizer, WordTokenizer)
        costs = {**costs, name: word_costs(counter, tokenizer, spelling)}
    return {
        name: _describe(writer, text_bytes[name], costs.get(name))
        for name, writer in writers.items()
    }


def _describe(writer: SplitWriter, text_bytes: int, costs: dict[str, Any] | None) -> dict[str, Any]:
    normalised = text_bytes if costs is None else costs["word_bytes"] + writer.word_gaps
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "normalised_bytes": normalised,
        "unk_tokens": writer.unk_tokens,
        "unk_bits": None if costs is None else costs["unk_bits"],
    }
