"""What runs here and why, and what to do about what is missing."""

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from tinylm import __version__
from tinylm.device import Device, choose_device, cpu_flags
from tinylm.device_step import about_steps
from tinylm.kernels import selections
from tinylm.tokenizer import implementation

PACKAGES = ("torch", "triton", "numpy", "safetensors", "datasets", "tqdm", "matplotlib")
OPTIONAL = {
    "triton": "comes with CUDA builds of torch",
    "zstandard": "needed for .jsonl.zst: pip install zstandard",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16")


def lines(device: str = "auto") -> Iterator[str]:
    """The report of ``tinylm doctor``, line by line."""
    import torch

    chosen = choose_device(device)
    yield f"tinylm        {__version__}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    for package in (*PACKAGES, "zstandard"):
        yield f"{package:13} {_version(package)}"
    yield ""
    yield f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_cpu()}"
    yield f"cuda          {_cuda()}"
    yield f"device        {chosen}"
    yield ""
    name, why = implementation()
    yield f"tokenizer     {name}: {why}"
    yield f"{'training step':21} {about_steps(chosen)}"
    yield from _selection_lines(chosen)
    advice = list(_advice(name, chosen.type))
    if advice:
        yield ""
    for line in advice:
        yield f"advice        {line}"


def _selection_lines(device: Device) -> Iterator[str]:
    for chosen in selections(device.name):
        kind = f" ({chosen.kind})" if chosen.kind else ""
        yield f"{chosen.operator:21} {chosen.implementation}{kind}: {chosen.reason}"


def check_kernels(device: str, say: Callable[[str], object]) -> bool:
    """``tinylm doctor --kernels``: a line for each check, then what runs; whether all went well.

    On a GPU it remembers what it finds, and `auto` goes by that from then on.
    """
    from tinylm.kernels import check, dispatch, first_check
    from tinylm.kernels.table import Result

    chosen = choose_device(device)
    results: list[Result] = []

    def show(result: Result) -> None:
        results.append(result)
        say(str(result))

    say(f"kernels on {chosen}: error against fp64, and time of forward and backward")
    failure = None
    if chosen.type == "cuda" and dispatch.triton_refusal("cuda") is None:
        found = first_check.measure(chosen.torch_device, say, full=True, show=show)
        failure = found.failure or found.unfinished
        say(first_check.summary(found))
    else:
        for result in check.check(chosen.torch_device):
            show(result)
    for line in _selection_lines(chosen):
        say(line)
    return failure is None and all(result.ok for result in results)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed ({OPTIONAL.get(package, 'pip install ' + package)})"


def _cpu() -> str:
    known = [flag for flag in CPU_FLAGS if flag in cpu_flags()]
    return f"{platform.machine()}" + (f" with {', '.join(known)}" if known else "")


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"built for CUDA {torch.version.cuda}, but no GPU or driver is found"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = (
        f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, "
        f"compute capability {gpu.major}.{gpu.minor})"
        for gpu in found
    )
    return f"CUDA {torch.version.cuda}: " + "; ".join(names)


def _advice(tokenizer: str, device: str) -> Iterator[str]:
    if tokenizer == "python":
        yield (
            "the Python tokenizers are tens of times slower; install a C++17 compiler and "
            "install tinylm again to build the compiled ones"
        )
    if device == "cpu":
        yield "training runs on the CPU; a GPU with a CUDA build of torch is many times faster"
