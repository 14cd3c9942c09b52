"""What was measured of the kernels on this GPU, remembered until anything it depends on changes.

A table is one JSON file in the cache folder: the results of `tinylm.kernels.check` as they came,
or the reason why there are none. `tinylm.kernels.first_check` makes it, `tinylm.kernels.dispatch`
goes by it.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

import torch

from tinylm import __version__
from tinylm.files import default_cache_dir, write_json


@dataclass(frozen=True)
class Result:
    """How one implementation of an operator did in one call.

    Attributes:
        case: the call in words: its shapes and options.
        kind: of calls, see `tinylm.kernels.dispatch.select`, that this result decides about:
            given where Triton and what torch would run there are compared, else empty.
        error: the largest of outputs and gradients, relative to the largest value; infinite if
            something was not finite, differed when repeated, or raised.
        milliseconds: of one forward and backward pass.
        refusal: why this implementation did not run, and torch did in its place.
        failure: why ``error`` is infinite, where it was not a value.
    """

    operator: str
    case: str
    kind: str
    dtype: str
    implementation: str
    error: float
    tolerance: float
    milliseconds: float
    refusal: str | None = None
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        note = self.failure or (f"refused: {self.refusal}" if self.refusal else "")
        return (
            f"{self.operator:21}{self.case:31}{self.dtype:9}{self.implementation:10}"
            f"{'ok' if self.ok else 'WRONG':6}error {self.error:.1e} of {self.tolerance:.0e}"
            f"{self.milliseconds:10.3f} ms  {note}"
        ).rstrip()


@dataclass(frozen=True)
class Choice:
    """Whether the Triton kernel is to run, and the measurement that says so."""

    triton: bool
    reason: str


@dataclass(frozen=True)
class Table:
    """What one GPU's check found.

    Attributes:
        environment: what the results depend on, see `environment`.
        failure: why there is nothing to go by: the check crashed, or never began.
        unfinished: why some kinds of calls are missing.
    """

    environment: dict[str, str]
    results: Sequence[Result] = ()
    failure: str | None = None
    unfinished: str | None = None
    choices: dict[tuple[str, str], Choice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", {} if self.failure else decide(self.results))


def decide(results: Sequence[Result]) -> dict[tuple[str, str], Choice]:
    """By operator and kind of call: the Triton kernel where it is the fastest, and right.

    An operator whose kernel was wrong in any call runs in torch in all of them.
    """
    wrong = {}
    times: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        if result.implementation == "triton" and not result.ok:
            what = result.failure or f"error {result.error:.1e} of {result.tolerance:.0e}"
            wrong[result.operator] = f"the kernel is wrong here: {result.case}, {what}"
        if result.kind:
            times.setdefault((result.operator, result.kind), {})[result.implementation] = result
    return {
        key: Choice(False, wrong[key[0]]) if key[0] in wrong else _faster(by_name)
        for key, by_name in times.items()
    }


def _faster(by_name: dict[str, Result]) -> Choice:
    own = by_name.get("triton")
    if own is None or len(by_name) == 1:
        return Choice(False, "the check compared nothing")
    if own.refusal is not None:
        return Choice(False, own.refusal)
    ordered = sorted(by_name.values(), key=lambda r: r.milliseconds)
    times = ", ".join(f"{r.implementation} {r.milliseconds:.3f} ms" for r in ordered)
    return Choice(ordered[0] is own, f"measured here: {times}")


@cache
def environment(device: torch.device) -> dict[str, str]:
    """What decides how right and how fast the kernels are on a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": os.environ.get("TRITON_OVERRIDE_ARCH") or f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tinylm": f"{__version__}+{_digest()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # some builds have another name
        return "unknown"


def _digest() -> str:
    """Of the kernels' sources, which change more often than the version."""
    digest = blake2b(digest_size=4)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def path(device: torch.device) -> Path:
    """Where the table of a device is remembered."""
    name = "_".join(environment(device).values())
    return default_cache_dir() / "kernels" / (re.sub(r"[^\w.+-]+", "-", name) + ".json")


_known: dict[torch.device, Table | None] = {}


def remembered(device: torch.device) -> Table | None:
    """The table of a device, read once; None if there is none that belongs to this environment."""
    device = numbered(device)
    if device not in _known:
        _known[device] = _read(device)
    return _known[device]


def remember(device: torch.device, table: Table) -> None:
    """Keeps ``table`` for this process, and in the cache folder.

    Raises:
        InputError, OSError, RuntimeError: the folder cannot be written, or there is none.
    """
    _known[numbered(device)] = table
    values = asdict(table)
    del values["choices"]
    write_json(path(device), values)


def forget() -> None:
    """Makes this process read the tables again."""
    _known.clear()


def numbered(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:N``, as which tensors know their device."""
    if str(device) != "cuda" or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _read(device: torch.device) -> Table | None:
    if not torch.cuda.is_available():
        return None
    # A file that is damaged, or of another version, is as good as none: the check makes it anew.
    # RuntimeError: there is no home folder to look in.
    try:
        values = json.loads(path(device).read_text("utf-8"))
        results = tuple(Result(**result) for result in values.pop("results"))
        table = Table(results=results, **values)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return table if table.environment == environment(device) else None
