"""Prepared data: memory-mapped token files and what is known about them.

A data folder holds, for each split (``train``, ``valid``), ``SPLIT.bin`` with the ids of its
tokens (raw little-endian uint16, or uint32 for vocabularies beyond 65,536 entries) and
``SPLIT.docs`` with the start of each document and the end of the last (raw little-endian int64);
``tokenizer.json``; ``spelling.safetensors`` (word level); and ``meta.json``, written last.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.files import crc32_of
from tinylm.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
META = "meta.json"
TOKENIZER = "tokenizer.json"
SPELLING = "spelling.safetensors"
OFFSET_DTYPE = np.dtype("<i8")


class DataFolderError(InputError):
    """A data folder is damaged; preparing it again repairs it."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of the ids on disk: the smallest that holds ``vocab_size`` ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split, memory-mapped.

    Attributes:
        ids: token ids, uint16 or uint32. [tokens]
        offsets: where each document starts in ``ids``, and the end of the last one; int64.
            [documents + 1]
    """

    ids: npt.NDArray[np.integer]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.ids.dtype

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """The ids of one document, its ``<EOS>`` included if it has one."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder.

    Attributes:
        path: the folder.
        meta: ``meta.json``: settings, sources, and per split ``documents``, ``tokens``,
            ``text_bytes`` (UTF-8 of the text), ``normalised_bytes`` (word level: UTF-8 of each
            document's words joined by single spaces; BPE: the text itself), ``unk_tokens`` and
            ``unk_bits`` (word level: bits to spell all unknown words; else ``null``); ``overlap``
            of validation with training.
        tokenizer: the tokenizer that made the ids.
        splits: the token files by name.
    """

    path: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, TokenFile]

    @property
    def train(self) -> TokenFile:
        """The training split. Raises `InputError` if the folder has none (evaluation only)."""
        return self._split("train")

    @property
    def valid(self) -> TokenFile:
        """The validation split, or all of a folder that `encode_documents` made."""
        return self._split("valid")

    def _split(self, name: str) -> TokenFile:
        if name not in self.splits:
            raise InputError(f"{self.path}: has no {name} split; prepare a corpus with one")
        return self.splits[name]


def open_dataset(path: str | os.PathLike[str], verify: bool = True) -> Dataset:
    """Opens a data folder.

    Args:
        path: a folder that `prepare` or `encode_documents` wrote.
        verify: read every file once to compare its checksum; without, only sizes are compared.

    Raises:
        InputError: the folder is none of ours, or a file in it is missing, truncated or corrupt.
    """
    folder = Path(path)
    meta = _read_meta(folder)
    for name, expected in meta["files"].items():
        _check_file(folder / name, expected, verify)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    splits = {name: map_split(folder, name, meta["dtype"]) for name in meta["splits"]}
    return Dataset(folder, meta, tokenizer, splits)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        version = meta["format"]
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no {META} in it, so it holds no prepared data; run prepare first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / META, f"not readable ({error})") from None
    if version != FORMAT:
        raise _damaged(folder / META, f"has format {version}; this version reads {FORMAT}")
    assert isinstance(meta, dict)
    return meta


def _check_file(path: Path, expected: dict[str, int], verify: bool) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _damaged(path, f"holds {size:,} bytes instead of {expected['bytes']:,}")
        if verify and crc32_of(path) != expected["crc32"]:
            raise _damaged(path, "is corrupt (its checksum differs)")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _damaged(path: Path, reason: str) -> DataFolderError:
    return DataFolderError(f"{path} {reason}; delete {path.parent} or run prepare again")


def map_split(folder: Path, name: str, dtype: str) -> TokenFile:
    """Maps the two files of one split; ``dtype`` is ``uint16`` or ``uint32``."""
    ids = _map(folder / f"{name}.bin", np.dtype(dtype).newbyteorder("<"))
    return TokenFile(ids, _map(folder / f"{name}.docs", OFFSET_DTYPE))


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # nothing to map; a split of documents without a word
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
