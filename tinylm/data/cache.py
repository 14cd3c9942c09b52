"""The cache folder: memoised hashes of source files, locks and leftovers."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from tinylm.errors import InputError
from tinylm.files import CHUNK_BYTES, disk_errors, write_json

LOCK_NAME = ".lock"
# A file changed within this many seconds may change again without a new modification time.
_SETTLED_SECONDS = 2.0


def file_state(path: Path) -> list[int]:
    """Size, modification time and inode: when none changed, the content is taken as unchanged."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def content_hash(path: Path, cache_dir: Path) -> str:
    """BLAKE2b of a file's content in hex, remembered in ``cache_dir`` until the file changes.

    Raises:
        InputError: the file cannot be read, or changes meanwhile.
    """
    name = blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    memo = cache_dir / "hashes" / f"{name}.json"
    try:
        state = file_state(path)
        known = _read_memo(memo)
        if known.get("state") == state:
            return str(known["hash"])
        digest = _hash_file(path)
        if file_state(path) != state:
            raise InputError(f"{path} changed while it was read; run again when it is complete")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; check the path and its rights"
        ) from None
    if time.time() - state[1] / 1e9 > _SETTLED_SECONDS:
        write_json(memo, {"state": state, "hash": digest})
    return digest


def _read_memo(memo: Path) -> dict[str, Any]:
    # A memo only saves time: a damaged one is made anew, with the same result.
    with suppress(OSError, ValueError):
        value = json.loads(memo.read_text("utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _hash_file(path: Path) -> str:
    digest = blake2b(digest_size=32)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds ``folder`` for this process; a killed process lets go by itself.

    Raises:
        InputError: another process holds it, and ``wait`` is False.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_NAME).touch()
    with open(folder / LOCK_NAME, "r+b") as file:
        if not _lock(file, wait=False):
            if not wait:
                raise InputError(
                    f"another process is at work in {folder}; let it end, or choose another folder"
                )
            print(f"waiting for another run that prepares {folder}", file=sys.stderr, flush=True)
            _lock(file, wait=True)
        yield


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _lock(file: IO[bytes], wait: bool) -> bool:
        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.2)

else:
    import fcntl

    def _lock(file: IO[bytes], wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files a killed run left; only for the holder of the folder's lock."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
