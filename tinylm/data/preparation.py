"""From a corpus to a data folder: train the tokenizer on the training split, encode the splits."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tinylm.data.cache import content_hash, locked
from tinylm.data.config import DataConfig
from tinylm.data.encode import Corpus, count_training, encode_corpus, unknown_words, word_costs
from tinylm.data.folder import DataFolder
from tinylm.data.overlap import CHUNK_TOKENS, measure_overlap
from tinylm.data.progress import Stage
from tinylm.data.sources import Source, open_source
from tinylm.data.tokens import (
    FORMAT,
    META,
    SPELLING,
    TOKENIZER,
    Dataset,
    TokenFile,
    map_split,
    open_dataset,
    token_dtype,
)
from tinylm.errors import InputError
from tinylm.files import atomic_write, default_cache_dir
from tinylm.spelling import SpellingModel
from tinylm.tokenizer import WordTokenizer, load_tokenizer

# Counts up when training a tokenizer or encoding changes its result.
_TOKENIZER_VERSION = 1

_Path = str | os.PathLike[str]


def prepare(
    config: DataConfig,
    cache_dir: _Path | None = None,
    out: _Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Makes the data folder of ``config``, or opens it if it was made before.

    The corpus is read twice, in bounded memory: once to train the tokenizer on the training
    split, once to encode both splits. A killed run goes on after its last finished stage. Where
    ``config.data`` is a folder that was prepared before, it is opened as it is.

    Args:
        config: what to prepare.
        cache_dir: where folders are kept, one for each content and configuration; default
            ``$TINYLM_CACHE``, else ``$XDG_CACHE_HOME/tinylm``, else ``~/.cache/tinylm``.
        out: the data folder itself, instead of one in the cache.
        progress: show bars on standard error (one line a stage where it is no terminal).

    Raises:
        InputError: no such corpus, text that cannot be read, a split without documents, ``out``
            holds something else, or the disk is full.
    """
    if out is None and (Path(config.data).expanduser() / META).is_file():
        return _open_prepared(config)
    cache = _cache(cache_dir)
    ready = None if config.trains_tokenizer else _tokenizer_file(config.tokenizer)
    kind = config.tokenizer if ready is None else load_tokenizer(ready).kind
    corpus = _open_corpus(config, kind)
    settings = {
        "text_field": config.text_field,
        "errors": config.errors,
        "tokenizer": config.tokenizer if ready is None else content_hash(ready, cache),
        "vocab_size": config.target_vocab_size,
        "valid_fraction": None if corpus.valid else config.valid_fraction,
        "document_eos": config.document_eos,
    }
    job = _Job.plan(corpus, settings, ("train", "valid"), cache, out, progress)
    return job.run(lambda: _make_tokenizer(job, config.target_vocab_size, kind, ready))


def encode_documents(
    data: str,
    tokenizer: _Path,
    *,
    spelling: _Path | None = None,
    train: TokenFile | None = None,
    text_field: str = "text",
    errors: str = "strict",
    document_eos: bool = True,
    cache_dir: _Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Encodes all of ``data`` with a ready tokenizer, into a folder with only a ``valid`` split.

    Args:
        data: a corpus, as in `DataConfig`.
        tokenizer: the path of a ``tokenizer.json``.
        spelling: the path of the ``spelling.safetensors`` that charges unknown words; without it
            ``unk_bits`` is ``null``.
        train: the training split to measure the overlap with; without it, none is measured.
        text_field: as in `DataConfig`.
        errors: as in `DataConfig`.
        document_eos: as in `DataConfig`.
        cache_dir: as in `prepare`.
        progress: as in `prepare`.

    Raises:
        InputError: as in `prepare`.
    """
    cache = _cache(cache_dir)
    tokenizer_path = _tokenizer_file(tokenizer)
    surrogates = load_tokenizer(tokenizer_path).kind == "word"
    source = open_source(data, text_field=text_field, errors=errors, surrogates=surrogates)
    spelling_path = None if spelling is None else Path(spelling)
    settings = {
        "text_field": text_field,
        "errors": errors,
        "tokenizer": content_hash(tokenizer_path, cache),
        "spelling": None if spelling_path is None else content_hash(spelling_path, cache),
        "overlap_with": None if train is None else _hash_tokens(train),
        "document_eos": document_eos,
    }
    corpus = Corpus(data=None, valid=source, valid_fraction=1.0)
    job = _Job.plan(corpus, settings, ("valid",), cache, None, progress)
    job = replace(job, train=train)

    def copy() -> dict[str, Any]:
        _copy(tokenizer_path, job.path / TOKENIZER)
        if spelling_path is not None:
            _copy(spelling_path, job.path / SPELLING)
        return {}

    return job.run(copy)


@dataclass(frozen=True)
class _Job:
    """One data folder to make. ``train`` is the training split where it is not in the folder."""

    corpus: Corpus
    settings: dict[str, Any]
    fingerprints: dict[str, str | None]
    splits: tuple[str, ...]
    folder: DataFolder
    progress: bool
    train: TokenFile | None = None

    @classmethod
    def plan(
        cls,
        corpus: Corpus,
        settings: dict[str, Any],
        splits: tuple[str, ...],
        cache: Path,
        out: _Path | None,
        progress: bool,
    ) -> "_Job":
        fingerprints = {
            name: None if source is None else source.fingerprint(cache)
            for name, source in (("data", corpus.data), ("valid", corpus.valid))
        }
        identity = {
            "format": FORMAT,
            "tokenizer_version": _TOKENIZER_VERSION,
            "settings": settings,
            "fingerprints": fingerprints,
        }
        key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        path = cache / "data" / key if out is None else Path(out).expanduser()
        return cls(corpus, settings, fingerprints, splits, DataFolder(path, key), progress)

    @property
    def path(self) -> Path:
        return self.folder.path

    def training_stage(self, title: str) -> Stage:
        """Shows the reading of the source that training documents come from."""
        return Stage(title, self.corpus.sources[:1], self.progress)

    def run(self, make_tokenizer: Callable[[], dict[str, Any]]) -> Dataset:
        """Opens the finished folder, or makes it with ``make_tokenizer`` as the first stage."""
        self.folder.check()
        if dataset := self.folder.opened():
            return dataset
        with locked(self.path):
            self.folder.check()
            if dataset := self.folder.recover():
                return dataset
            self.folder.begin()
            self._make(make_tokenizer)
            return open_dataset(self.path, verify=False)

    def _make(self, make_tokenizer: Callable[[], dict[str, Any]]) -> None:
        costs = self.folder.stage("tokenizer", (TOKENIZER, SPELLING), make_tokenizer)
        files = [f"{split}.{kind}" for split in self.splits for kind in ("bin", "docs")]
        described = self.folder.stage("encode", files, lambda: self._encode(costs))
        tokenizer = load_tokenizer(self.path / TOKENIZER)
        dtype = token_dtype(tokenizer.vocab_size)
        overlap = self.folder.stage("overlap", (), lambda: self._overlap(dtype.name))
        for source in self.corpus.sources:
            if source.changed():
                self.folder.discard()
                raise InputError(
                    f"{source.name} changed while it was read; run again when it is complete"
                )
        self.folder.finish(
            {
                "format": FORMAT,
                "settings": self.settings,
                "sources": self.fingerprints,
                "tokenizer": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype.name,
                "splits": described,
                "overlap": overlap,
            }
        )

    def _encode(self, costs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        tokenizer = load_tokenizer(self.path / TOKENIZER)
        spelling = self.path / SPELLING
        with Stage("encode", self.corpus.sources, self.progress) as stage:
            return encode_corpus(
                self.corpus,
                self.path,
                tokenizer,
                self.splits,
                costs,
                SpellingModel.load(spelling) if spelling.exists() else None,
                self.settings["document_eos"],
                stage,
            )

    def _overlap(self, dtype: str) -> dict[str, Any] | None:
        train = self.train
        if "train" in self.splits:
            train = map_split(self.path, "train", dtype)
        if train is None:
            return None
        overlap = measure_overlap(map_split(self.path, "valid", dtype).ids, train.ids)
        return {
            "chunk_tokens": CHUNK_TOKENS,
            "chunks": overlap.chunks,
            "found": overlap.found,
            "share": overlap.share,
        }


def _open_prepared(config: DataConfig) -> Dataset:
    """Opens the data folder ``config.data``, if it is what ``config`` asks for beside."""
    dataset = open_dataset(Path(config.data).expanduser())
    asked: dict[str, Any] = {"document_eos": config.document_eos}
    if config.trains_tokenizer:
        asked["tokenizer"] = config.tokenizer
    if config.vocab_size is not None:
        asked["vocab_size"] = config.vocab_size
    there = {**dataset.meta["settings"], "tokenizer": dataset.tokenizer.kind}
    for name, value in asked.items():
        if there[name] != value:
            raise InputError(
                f"{config.data} was prepared with {name} {there[name]}, not {value};"
                " ask for that, or prepare another folder"
            )
    if config.valid is not None:
        raise InputError(f"{config.data} has its own validation split; leave out --valid")
    return dataset


def _make_tokenizer(
    job: _Job, vocab_size: int | None, kind: str, ready: Path | None
) -> dict[str, Any]:
    """Writes the tokenizer and, for words, the spelling model; returns training's word costs."""
    if ready is not None:
        _copy(ready, job.path / TOKENIZER)
    if kind == "word":
        return {"train": _fit_words(job, vocab_size)}
    if vocab_size is not None:
        _train_bpe(job, vocab_size)
    return {}


def _train_bpe(job: _Job, vocab_size: int) -> None:
    from tinylm.tokenizer import BPETokenizer

    counter = BPETokenizer.counter()
    with job.training_stage("train tokenizer") as stage:
        count_training(job.corpus, counter, stage)
        tokenizer = BPETokenizer.from_counter(
            counter,
            vocab_size,
            progress=lambda _, done, total: stage.note(f"{done:,} of {total:,} tokens"),
        )
    tokenizer.save(job.path / TOKENIZER)


def _fit_words(job: _Job, vocab_size: int | None) -> dict[str, Any]:
    """``vocab_size`` is ``None`` where the folder already has its tokenizer."""
    counter = WordTokenizer.counter()
    with job.training_stage("count words" if vocab_size is None else "train tokenizer") as stage:
        count_training(job.corpus, counter, stage)
        if vocab_size is None:
            tokenizer = WordTokenizer.load(job.path / TOKENIZER)
        else:
            tokenizer = WordTokenizer.from_counter(counter, vocab_size)
            tokenizer.save(job.path / TOKENIZER)
        spelling = SpellingModel.fit(*unknown_words(counter, tokenizer))
        spelling.save(job.path / SPELLING)
        return word_costs(counter, tokenizer, spelling)


def _open_corpus(config: DataConfig, kind: str) -> Corpus:
    def opened(data: str) -> Source:
        return open_source(
            data,
            text_field=config.text_field,
            errors=config.errors,
            surrogates=kind == "word",
            cut=config.valid is None,
        )

    valid = None if config.valid is None else opened(config.valid)
    return Corpus(opened(config.data), valid, config.valid_fraction)


def _cache(cache_dir: _Path | None) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()


def _tokenizer_file(tokenizer: _Path) -> Path:
    path = Path(tokenizer).expanduser()
    if not path.is_file():
        raise InputError(
            f"no such file: {path}; a tokenizer is 'word', 'bpe' or the path of a tokenizer.json"
        )
    return path


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file:
        file.write(source.read_bytes())


def _hash_tokens(tokens: TokenFile) -> str:
    digest = blake2b(digest_size=32)
    for start in range(0, len(tokens), 1 << 24):
        digest.update(tokens.ids[start : start + (1 << 24)].tobytes())
    return digest.hexdigest()
