"""Writing files so that a kill at any moment leaves the old content or the new, never a mixture."""

import errno
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tinylm.errors import InputError

CHUNK_BYTES = 1 << 24


def default_cache_dir() -> Path:
    """``$TINYLM_CACHE``, else ``$XDG_CACHE_HOME/tinylm``, else ``~/.cache/tinylm``."""
    if own := os.environ.get("TINYLM_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "tinylm"
    return Path.home() / ".cache" / "tinylm"


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full, read-only or impossible place into an `InputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space or choose another folder",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "permission denied; choose another folder",
            errno.ENOENT: "no folder can be made there; choose another one",
            errno.ENOTDIR: "a part of that path is a file; choose another folder",
            errno.EISDIR: "that is a folder; choose another name",
        }
        if error.errno not in reasons:
            raise
        raise InputError(f"cannot write {path}: {reasons[error.errno]}") from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the name ``path`` only once it is whole and on disk.

    Raises:
        InputError: the disk is full or not writable; ``path`` is then as it was before.
    """
    target = Path(path)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        )
        try:
            os.chmod(temporary, 0o644)
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def crc32_of(path: str | os.PathLike[str]) -> int:
    """CRC-32 of a file's content, read in bounded memory."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; a no-op where folders cannot be opened (Windows)."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
