"""Which device and which arithmetic: decided once, with the reason."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tinylm.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """Where a model runs and the precision of its matrix products."""

    name: str
    precision: str
    why: str

    @property
    def type(self) -> str:
        return self.name.split(":")[0]

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.name)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which matrix products run in this precision."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.type, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.name}, {self.precision} ({self.why})"


def choose_device(device: str = "auto", precision: str = "auto") -> Device:
    """The device asked for (or the best there is) and its precision.

    By capability: CUDA 8.0 and above bf16, CUDA 7.x fp16 with loss scaling, older CUDA fp32;
    CPUs with AVX512_BF16 or AMX bf16, other CPUs and MPS fp32.

    Raises:
        InputError: the device is unknown or not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        reason = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no GPU found"
        )
        raise InputError(f"device {device!r} is not available: {reason}; use --device cpu")
    if kind == "mps" and not _has_mps():
        raise InputError("device 'mps' is not available on this machine; use --device cpu")
    try:
        index = torch.device(device).index
    except RuntimeError:
        raise InputError(
            f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps"
        ) from None
    if kind == "cuda" and index is not None and index >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: {torch.cuda.device_count()} GPUs found")
    best, why = _best_precision(device, kind)
    if precision == "auto":
        return Device(device, best, why)
    if precision == "fp16" and kind != "cuda":
        raise InputError("precision fp16 needs a CUDA device; use bf16 or fp32")
    return Device(device, precision, "as asked")


@contextmanager
def determinism(on: bool) -> Iterator[None]:
    """Within it, torch runs only algorithms that give the same bits each time, or raises.

    On a CPU all do, as long as the number of threads stays the same. On a GPU some are slower;
    cuBLAS needs a fixed workspace for it, which has to be asked for before its first use.
    """
    if not on:
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def freed_memory_kept(device: Device) -> Iterator[None]:
    """Within it, on a CPU, freed memory stays in the process, for what is allocated next.

    The C library gives it back at the end of each training step, and getting it again costs a
    page fault every 4 KiB: 5 to 9 % of a step. Concerns the whole process; nothing is done where
    the library is not glibc, or its environment variables (``MALLOC_…``) say what to do.
    """
    module = _compiled() if device.type == "cpu" else None
    if module is None or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    module.keep_freed_memory(True)
    try:
        yield
    finally:
        module.keep_freed_memory(False)


def _compiled() -> ModuleType | None:
    try:
        from tinylm import _C
    except ImportError:
        return None
    return _C


def conditions(device: Device) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the configuration."""
    import torch

    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device.torch_device)
    else:
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device.type,
        "precision": device.precision,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def changed_conditions(
    there: dict[str, Any], here: dict[str, Any], deterministic: bool
) -> str | None:
    """What to say of a run that goes on under other `conditions`; None under the same.

    Raises:
        InputError: a deterministic run would.
    """
    different = [k for k, v in here.items() if there.get(k) != v]
    if not different:
        return None
    listed = "; ".join(f"{k} is {there.get(k)} there and {here[k]} here" for k in different)
    text = f"the checkpoint was made under other conditions ({listed})"
    if deterministic:
        raise InputError(
            f"{text}, and a deterministic run has to go on as it began; OMP_NUM_THREADS sets "
            "the number of threads"
        )
    return f"{text}: the run goes on the same only up to rounding"


def _best_precision(device: str, kind: str) -> tuple[str, str]:
    import torch

    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # Not torch.cuda.is_bf16_supported(): that says yes on a T4, by slow emulation.
        precision = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
        return precision, f"compute capability {major}.{minor}"
    if kind == "cpu":
        flags = cpu_flags() & {"avx512_bf16", "amx_bf16"}
        if flags:
            return "bf16", f"the processor has {' and '.join(sorted(flags))}"
        return "fp32", "the processor has no bf16 arithmetic"
    return "fp32", "the safe choice on this device"


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def cpu_flags() -> set[str]:
    """The processor's instruction-set flags, as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not path.exists():
        return set()
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
