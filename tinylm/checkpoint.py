"""Saving and loading tensors and runs. Nothing is ever unpickled but plain tensors.

A file is safetensors with JSON metadata and a checksum of its contents, written to a temporary
name and renamed, so it is either whole or not there.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinylm.errors import InputError
from tinylm.files import atomic_write

Path_ = str | os.PathLike[str]


def save_tensors(path: Path_, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Writes tensors and ``info`` (JSON) to ``path``, atomically."""
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    text = json.dumps(info)
    metadata = {"tinylm": text, "crc32": str(_checksum(tensors, text)), "format": "pt"}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata))


def load_tensors(path: Path_) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote.

    Raises:
        InputError: there is no such file, or it is damaged (truncated, changed, another format).
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "tinylm" not in metadata or "crc32" not in metadata:
        raise InputError(f"{path} was not written by tinylm: it carries no checksum")
    if str(_checksum(tensors, metadata["tinylm"])) != metadata["crc32"]:
        raise InputError(f"{path} is damaged: its checksum does not match its content")
    return tensors, json.loads(metadata["tinylm"])


def _checksum(tensors: dict[str, Tensor], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(raw.data, zlib.crc32(name.encode(), crc))
    return crc


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The newest few checkpoints of a run, in ``RUN/checkpoints``."""

    def __init__(self, folder: Path_, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        matches = (re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        info = {"step": checkpoint.step, "state": checkpoint.state}
        save_tensors(self.path(checkpoint.step), checkpoint.tensors, info)
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink(missing_ok=True)

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is passed over, with a warning.

        Raises:
            InputError: there are checkpoints, but none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                tensors, info = load_tensors(self.path(step))
                return Checkpoint(info["step"], tensors, info["state"])
            except InputError as error:
                warn(f"{error}; going back to the checkpoint before it")
        if steps:
            raise InputError(
                f"every checkpoint in {self.folder} is damaged; start again with --fresh"
            )
        return None
