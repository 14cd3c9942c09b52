"""Documents from wherever ``--data`` points: files, a data set of the Hub, or Python itself."""

import glob
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from tinylm.data.cache import content_hash, file_state
from tinylm.data.formats import (
    KNOWN,
    MAX_DOCUMENT_CHARS,
    Position,
    ReadOptions,
    read_documents,
    suffix_of,
)
from tinylm.errors import InputError

_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:/]*){0,2}")
# Endings nobody gives a data set: a missing file with one of these is a missing file.
_FILE_ENDINGS = (".csv", ".tsv", ".json", ".gz", ".zst", ".zip", ".bz2", ".xz", ".md", ".html")
# Fewer text files than this are cut up, so that a random 5 % of the documents is not none.
_FEW_FILES = 100
_DOCUMENTS_OF_FEW_FILES = 400
_LEAST_CUT_CHARS, _MOST_CUT_CHARS = 1 << 10, 1 << 16


class Source(ABC):
    """A corpus that can be read any number of times, in bounded memory.

    Attributes:
        name: what the user asked for.
        total_bytes: size of what is read from, in bytes; the compressed size of packed files.
    """

    name: str
    total_bytes: int

    def __init__(self) -> None:
        self._position = Position()

    @property
    def bytes_read(self) -> int:
        """How far the latest `documents` has come, of `total_bytes`."""
        return self._position.bytes_read

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, always in the same order.

        Raises:
            InputError: text that cannot be read; the message names file and line.
        """

    @abstractmethod
    def fingerprint(self, cache_dir: Path) -> str:
        """A hash that differs when the documents may differ."""

    def changed(self) -> bool:
        """Whether the source changed since it was opened, as far as a quick look can tell."""
        return False


class FileSource(Source):
    """Local files, in sorted order.

    A ``.txt`` file is one document, up to 1,048,576 characters; a longer one is cut there at the
    ends of paragraphs. Where ``cut`` is set and there are fewer than 100 text files, they are cut
    shorter, into 400 documents or more of 1,024 to 65,536 characters, because a split needs
    documents to choose from.
    """

    def __init__(self, name: str, paths: Sequence[Path], options: ReadOptions, cut: bool) -> None:
        super().__init__()
        self.name = name
        self.paths = list(paths)
        self._cut = cut
        self._states = self._stat()
        self.total_bytes = sum(state[0] for state in self._states)
        self._options = replace(options, document_chars=self._document_chars())

    def documents(self) -> Iterator[str]:
        self._position = position = Position()
        for path, (size, _, _) in zip(self.paths, self._states, strict=True):
            yield from read_documents(path, self._options, position)
            position.finish_file(size)

    def fingerprint(self, cache_dir: Path) -> str:
        digest = blake2b(digest_size=32)
        for path in self.paths:
            digest.update(f"{suffix_of(path)} {content_hash(path, cache_dir)}\n".encode())
        digest.update(f"{self._options.document_chars}".encode())
        return f"files:{digest.hexdigest()}"

    def changed(self) -> bool:
        return self._stat() != self._states

    def _stat(self) -> list[list[int]]:
        try:
            return [file_state(path) for path in self.paths]
        except OSError as error:
            raise InputError(
                f"cannot read {error.filename}: {error.strerror}; check the path and its rights"
            ) from None

    def _document_chars(self) -> int:
        sizes = [
            state[0]
            for path, state in zip(self.paths, self._states, strict=True)
            if suffix_of(path) == ".txt"
        ]
        if not self._cut or len(sizes) >= _FEW_FILES:
            return MAX_DOCUMENT_CHARS
        share = sum(sizes) // _DOCUMENTS_OF_FEW_FILES
        return min(max(share, _LEAST_CUT_CHARS), _MOST_CUT_CHARS)


def open_source(
    data: str,
    *,
    text_field: str = "text",
    errors: str = "strict",
    surrogates: bool = True,
    cut: bool = False,
) -> Source:
    """The corpus that ``data`` names; its forms are described at `DataConfig`.

    Args:
        data: the path, glob, data-set id or ``builtin``.
        text_field: the field of a record that holds its text.
        errors: ``strict`` or ``replace``, for text that is not valid Unicode.
        surrogates: let lone surrogates, which JSON escapes can spell and UTF-8 cannot, pass.
        cut: cut few text files into enough documents to split, see `FileSource`.

    Raises:
        InputError: nothing is there, or nothing that can be read.
    """
    options = ReadOptions(text_field=text_field, errors=errors, surrogates=surrogates)
    path = Path(data).expanduser()
    if data == "builtin":
        from tinylm.data.builtin import BuiltinSource

        return BuiltinSource()
    if path.is_dir():
        return FileSource(data, _files_in(path), options, cut)
    if path.exists():
        _check_suffix(path)
        return FileSource(data, [path], options, cut)
    if _GLOB.search(data):
        return FileSource(data, _files_matching(data), options, cut)
    if _is_missing_file(data):
        raise InputError(f"no such file or folder: {data}; check the path")
    from tinylm.data.hub import HubSource

    return HubSource(data, options)


def _files_in(folder: Path) -> list[Path]:
    """Readable files under ``folder``, hidden ones aside; other kinds of file are passed over."""
    found = [
        path
        for path in folder.rglob("*")
        if suffix_of(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{folder}: no text in this folder; it needs files of {KNOWN}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _files_matching(pattern: str) -> list[Path]:
    names = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    paths = sorted((p for p in map(Path, names) if p.is_file()), key=lambda p: p.as_posix())
    if not paths:
        raise InputError(f"no file matches {pattern}; check the pattern and quote it in the shell")
    for path in paths:
        _check_suffix(path)
    return paths


def _check_suffix(path: Path) -> None:
    if suffix_of(path) is None:
        raise InputError(f"{path}: unknown kind of file; use one of {KNOWN}")


def _is_missing_file(data: str) -> bool:
    named_as_file = suffix_of(Path(data)) is not None or data.lower().endswith(_FILE_ENDINGS)
    return named_as_file or _HUB_ID.fullmatch(data) is None
