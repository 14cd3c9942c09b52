"""A data folder while it is being made: finished stages survive a kill and are not done again."""

import json
import sys
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from tinylm.data.cache import LOCK_NAME, remove_leftovers
from tinylm.data.tokens import META, SPELLING, TOKENIZER, DataFolderError, Dataset, open_dataset
from tinylm.errors import InputError
from tinylm.files import crc32_of, disk_errors, write_json

_STAGES = "stages.json"
_OURS = {META, TOKENIZER, SPELLING, _STAGES, LOCK_NAME} | {
    f"{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "docs")
}


class DataFolder:
    """The folder at ``path`` for the data that ``key`` stands for.

    ``stages.json`` records each finished stage with its result and its files' checksums; it goes
    when ``meta.json`` is there. All but `opened` and `check` need the folder's lock.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def check(self) -> None:
        """Raises `InputError` if the folder holds other data, or files that are not ours."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose a folder to write the data to")
        keys = {self._read(name).get("key") for name in (META, _STAGES)} - {None}
        if keys - {self.key}:
            raise InputError(
                f"{self.path} holds data of another configuration or corpus; choose another folder"
                " or delete it"
            )
        others = [p.name for p in self.path.iterdir() if not _is_ours(p.name)]
        if others:
            raise InputError(
                f"{self.path} holds files that are no prepared data ({min(others)}); choose an"
                " empty or new folder"
            )

    def opened(self) -> Dataset | None:
        """The finished data, if all is there and whole."""
        if self._read(META).get("key") != self.key or (self.path / _STAGES).exists():
            return None
        try:
            return open_dataset(self.path)
        except DataFolderError:
            return None

    def recover(self) -> Dataset | None:
        """Deletes leftovers of killed runs; the finished data if it is whole.

        Damaged data is deleted, with a line that says so.
        """
        with disk_errors(self.path):
            remove_leftovers(self.path)
            if not (self.path / META).exists():
                return None
            if self._read(META).get("key") == self.key:
                (self.path / _STAGES).unlink(missing_ok=True)  # killed just before this
        try:
            return open_dataset(self.path)
        except DataFolderError as error:
            _say(f"{error}: doing so now")
            self.discard()
            return None

    def discard(self) -> None:
        """Deletes all that was made."""
        with disk_errors(self.path):
            for name in _OURS - {LOCK_NAME}:
                (self.path / name).unlink(missing_ok=True)

    def begin(self) -> None:
        """Marks the folder as being made for `key`."""
        if not (self.path / _STAGES).exists():
            write_json(self.path / _STAGES, {"key": self.key, "stages": {}})

    def stage(self, name: str, files: Iterable[str], make: Callable[[], Any]) -> Any:
        """The result of stage ``name``: from the record, or of ``make``, which writes ``files``."""
        stages = self._read(_STAGES).get("stages", {})
        if name in stages:
            if self._whole(stages[name]["files"]):
                return stages[name]["result"]
            _say(f"{self.path}: a file of the stage {name!r} is damaged; making it again")
            # Later stages were made from this one.
            stages = dict(takewhile(lambda item: item[0] != name, stages.items()))
        result = make()
        checks = {file: self._check_of(file) for file in files if (self.path / file).exists()}
        stages[name] = {"files": checks, "result": result}
        write_json(self.path / _STAGES, {"key": self.key, "stages": stages})
        return result

    def finish(self, meta: dict[str, Any]) -> None:
        """Writes ``meta.json``, with the checksums of all files, and ends the record."""
        files = {}
        for stage in self._read(_STAGES)["stages"].values():
            files.update(stage["files"])
        write_json(self.path / META, {"key": self.key, **meta, "files": files})
        with disk_errors(self.path):
            (self.path / _STAGES).unlink()

    def _whole(self, checks: dict[str, dict[str, int]]) -> bool:
        return all(
            (self.path / file).is_file() and self._check_of(file) == check
            for file, check in checks.items()
        )

    def _check_of(self, file: str) -> dict[str, int]:
        path = self.path / file
        return {"bytes": path.stat().st_size, "crc32": crc32_of(path)}

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty if it is missing or damaged, and so worth nothing."""
        try:
            value = json.loads((self.path / name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}


def _is_ours(name: str) -> bool:
    return name in _OURS or any(
        name.startswith(f".{own}.") and name.endswith(".tmp") for own in _OURS
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
