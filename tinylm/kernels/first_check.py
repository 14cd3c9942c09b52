"""The check of the kernels on a GPU, in a process of its own: once, before they are first used.

A kernel that crashes, loses the device or never ends does so there, and the process that trains
only reads what came of it. Nothing is checked where ``TINYLM_KERNELS`` leaves nothing to choose.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from tinylm.distributed import is_main
from tinylm.errors import InputError
from tinylm.kernels import dispatch, table
from tinylm.kernels.table import Result, Table

SECONDS = 120.0  # for the first check
SECONDS_IN_FULL = 900.0  # for that of ``tinylm doctor --kernels``
AGAIN = "tinylm doctor --kernels checks again"
_POLL_SECONDS = 0.05

Say = Callable[[str], object]


def prepare(device: torch.device, say: Say = dispatch.logger.warning) -> None:
    """Sees to it that ``auto`` knows which kernels are right and fast on a GPU.

    Checks them, up to `SECONDS`, if no table of this GPU and these versions is remembered, and
    tells so with ``say``. Whatever goes wrong there, torch runs and the table says why; that is
    remembered too. Only rank 0 of several processes checks.

    Raises:
        InputError: ``TINYLM_KERNELS`` is none of its values.
    """
    if dispatch.setting() != "auto" or device.type != "cuda" or not is_main():
        return
    if dispatch.triton_refusal("cuda") or table.remembered(device) is not None:
        return
    gpu = table.environment(table.numbered(device))["gpu"]
    say(f"checking the kernels on this GPU ({gpu}), once: up to {SECONDS:.0f} seconds")
    say(summary(measure(device, say)))


def measure(
    device: torch.device,
    say: Say,
    full: bool = False,
    show: Callable[[Result], object] = lambda result: None,
) -> Table:
    """Checks the kernels and remembers what was found; ``show`` gets each result as it comes."""
    device = table.numbered(device)
    seconds = SECONDS_IN_FULL if full else SECONDS
    results: list[Result] = []
    failure = unfinished = None
    try:
        for result in run(command(device, full, seconds), seconds):
            results.append(result)
            show(result)
        failure = None if results else "it found nothing to check"
    except TimeoutError:
        unfinished = f"the check did not come to such calls within {seconds:.0f} s"
    except (RuntimeError, OSError) as error:
        failure = str(error)
    if failure is not None:
        failure = f"the check of the Triton kernels failed: {failure}"
    found = Table(table.environment(device), results, failure, unfinished)
    try:
        table.remember(device, found)
    except (InputError, OSError, RuntimeError) as error:
        say(f"what the check found is not remembered: {error}")
    dispatch.forget()
    return found


def summary(found: Table) -> str:
    """One line: what runs where."""
    if found.failure is not None:
        return f"kernels: all in torch; {found.failure}; {AGAIN}"
    kinds = Counter(operator for operator, _ in found.choices)
    own = Counter(operator for (operator, _), choice in found.choices.items() if choice.triton)
    parts = [
        f"{operator} {'triton' if own[operator] else 'torch'}"
        + (f" in {own[operator]} of {n} kinds of calls" if 0 < own[operator] < n else "")
        for operator, n in kinds.items()
    ]
    cut_off = f"; {found.unfinished}" if found.unfinished else ""
    return f"kernels: {', '.join(parts) or 'all in torch'}{cut_off} (tinylm doctor tells more)"


def command(device: torch.device, full: bool, seconds: float) -> Sequence[str]:
    """The program that checks: see `tinylm.kernels.check.main`."""
    extent = "full" if full else "quick"
    return sys.executable, "-m", "tinylm.kernels.check", str(device), extent, str(seconds)


def run(command: Sequence[str], seconds: float) -> Iterator[Result]:
    """The results that a program prints, as they come. It does not outlive this call.

    Raises:
        TimeoutError: it took longer than ``seconds``.
        RuntimeError: it failed, in one line why.
        OSError: it could not be started.
    """
    # Files, not pipes: a process that even a kill does not end keeps nobody waiting.
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                env=_environment(), start_new_session=True,
            )  # fmt: skip
        try:
            with out.open("rb") as printed:
                yield from _results(process, printed, time.monotonic() + seconds)
        finally:
            _end(process)
        if process.returncode:
            raise RuntimeError(_reason(process.returncode, err.read_text(errors="replace")))


def _environment() -> dict[str, str]:
    """This process's, in which the same tinylm is found."""
    paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _results(
    process: subprocess.Popen[bytes], printed: IO[bytes], deadline: float
) -> Iterator[Result]:
    rest = b""
    while True:
        ended = process.poll() is not None  # asked first, so that the last lines are read too
        *lines, rest = (rest + printed.read()).split(b"\n")
        for line in lines:
            with suppress(ValueError, TypeError):  # some library's own output
                yield Result(**json.loads(line))
        if ended:
            return
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills it, and the compilers it may have started."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _reason(code: int, stderr: str) -> str:
    """In one line, of what a program that failed has left."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in stderr.split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"it ended with exit code {code}"])[-1][:200]
