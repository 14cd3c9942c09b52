"""Where a run's records go beside ``metrics.jsonl``: TensorBoard and Weights & Biases.

Both are extras, imported only where a run asks for them (``--logger``). A logger gets each record
as `tinylm.metrics.MetricsFile` does, under the same names. One that fails while the run goes on is
left out from then on, with a line that says so: no run should end for want of a picture of it.
"""

import dataclasses
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tinylm.errors import InputError
from tinylm.files import atomic_write

logger = logging.getLogger("tinylm")
Record = Mapping[str, Any]


class Logger(Protocol):
    """What a logger has to do; `LOGGERS` names those there are."""

    def log(self, record: Record) -> None:
        """Takes one record: ``step``, and numbers or ``samples``, a list of texts."""

    def close(self) -> None:
        """Called once, however the run ends."""


class TensorBoardLogger:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path, config: Any, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier session logged after the checkpoint this one goes on from is hidden.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            self._writer.add_text("config", _as_table(config))

    def log(self, record: Record) -> None:
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, record["step"])
        for i, text in enumerate(record.get("samples", ())):
            self._writer.add_text(f"sample {i + 1}", text, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` only writes it to ``RUN/wandb``."""

    def __init__(self, folder: Path, config: Any, step: int) -> None:
        import wandb

        identity = folder / "wandb-id"  # a resumed run goes on in the same place
        if not identity.exists():
            with atomic_write(identity) as file:
                file.write(secrets.token_hex(4).encode())
        self._wandb: Any = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tinylm"),
            name=folder.name,
            dir=str(folder),
            id=identity.read_text(),
            resume="allow",
            config=dataclasses.asdict(config),
        )
        # Its own count of steps cannot go back, as that of a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        row = dict(_numbers(record))
        if "samples" in record:
            row["samples"] = self._wandb.Table(["text"], [[text] for text in record["samples"]])
        self._run.log({"step": record["step"], **row})

    def close(self) -> None:
        self._run.finish()


# Name -> the module it needs, and what makes one of a folder, a configuration and a first step.
LOGGERS: dict[str, tuple[str, Callable[[Path, Any, int], Logger]]] = {
    "tensorboard": ("tensorboard", TensorBoardLogger),
    "wandb": ("wandb", WandbLogger),
}


def logger_names(text: str) -> list[str]:
    """The names in a ``--logger`` option; `InputError` for one that is unknown."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"unknown logger {name!r}; choose {', '.join(LOGGERS)}, or both")
    return names


def require_loggers(text: str) -> None:
    """Finds out before a run begins whether its loggers are installed.

    Raises:
        InputError: with the command that installs what is missing.
    """
    for name in logger_names(text):
        try:
            import_module(LOGGERS[name][0])
        except ImportError as error:
            raise InputError(
                f"logger {name} is not installed ({error}); pip install 'tinylm[{name}]'"
            ) from error


@contextmanager
def open_loggers(
    text: str, config: Any, folder: Path, step: int
) -> Iterator[Callable[[Record], None]]:
    """Opens the loggers of a run that goes on after ``step``; yields what takes its records.

    Args:
        text: a ``--logger`` option.

    Raises:
        InputError: a logger cannot start, for want of a network or a login, say.
    """
    opened: dict[str, Logger] = {}

    def each(what: Callable[[Logger], None]) -> None:
        for name, one in list(opened.items()):
            try:
                what(one)
            except Exception as error:  # whatever goes wrong there, the run goes on
                logger.warning("%s no longer logs: %s", name, _one_line(error))
                del opened[name]

    try:
        for name in logger_names(text):
            try:
                opened[name] = LOGGERS[name][1](folder, config, step)
            except Exception as error:
                hint = "; WANDB_MODE=offline needs no network" if name == "wandb" else ""
                raise InputError(f"{name} does not start: {_one_line(error)}{hint}") from error
        yield lambda record: each(lambda one: one.log(record))
    finally:
        each(lambda one: one.close())


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield name, value


def _as_table(config: Any) -> str:
    rows = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def _one_line(error: Exception) -> str:
    with suppress(IndexError):
        return str(error).strip().splitlines()[0]
    return type(error).__name__
