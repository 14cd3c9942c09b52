"""Compiles every Triton kernel for a GPU that need not be there: ``triton_compile.py ARCH DTYPE``.

The operators are called as ever, on the CPU, with Triton's driver replaced by one that claims the
architecture (75, 80, 89, 90) and every launch by the compilation that would come before it. So what
is examined is what would run; with ``stock``, one call of it without the lowering for 7.5. Prints
one JSON object per kernel: its registers, its stack (spills), its shared memory and the matrix
instructions in it. `test_triton_compile.py` holds the budgets.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tinylm.kernels import turing
from tinylm.kernels.triton import attention, attention_decode, linear_cross_entropy, norm

ARCH = int(sys.argv[1])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)")


class Driver:
    """Enough of a CUDA driver to compile for ARCH."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_launching(then: Callable[[Any, Any, Any, Any], None]) -> None:
    """Every launch calls ``then(compiled kernel, grid, arguments, options)`` instead."""
    driver.set_active(Driver())
    if "stock" not in sys.argv:
        turing.install()
    for module in (attention, attention_decode, linear_cross_entropy):
        module.capability = lambda x: divmod(ARCH, 10)
    for module in (attention_decode, norm):
        module.processors = lambda x: 40

    def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            then(kernel.warmup(*args, grid=grid, **kwargs), grid, args, kwargs)

        return launch

    JITFunction.__getitem__ = launcher


def resources(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "kernel": compiled.metadata.name,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "mma": sorted(set(MATRIX_INSTRUCTION.findall(compiled.asm["ptx"]))),
    }


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a training step calls, at the shapes of the presets and at the largest there are."""
    for length, head_dim in ((32, 32), (64, 64), (256, 32), (256, 64), (256, 128)):
        if head_dim > attention.LARGEST_HEAD_DIM[dtype]:
            continue
        qkv = [torch.empty(2, 4, length, head_dim, dtype=dtype) for _ in range(3)]
        out, lse = torch.empty(2, length, 4, head_dim, dtype=dtype), torch.empty(2, 4, length)
        starts = [None]
        if (length, head_dim) in ((64, 64), (256, 128)):  # the fullest of each kind
            starts.append(torch.zeros(2, length, dtype=torch.int32))
        for start in starts:
            name = f"attention T={length} D={head_dim}{'' if start is None else ' documents'}"
            yield name, partial(attention.attention_forward, *qkv, start, 0.2, True)
            backward = attention.attention_backward
            yield name, partial(backward, out, *qkv, start, out, lse, 0.2, True)
    head_dim = attention.LARGEST_HEAD_DIM[dtype]
    q, kv = (torch.empty(1, h, s, head_dim, dtype=dtype) for h, s in ((8, 1), (4, 4096)))
    start = torch.zeros(1, 1, dtype=torch.int32)
    name = f"decoding S=4096 D={head_dim} padded"
    yield name, partial(attention.attention_forward, q, kv, kv, start, 0.2, True)
    weight, rows, x = torch.empty(128), torch.empty(512), torch.empty(512, 128, dtype=dtype)
    yield "layer_norm", partial(norm.norm_forward, x, x, weight, weight, 1e-5, False)
    yield "layer_norm", partial(norm.norm_backward, x, x, x, weight, rows, rows, False)
    yield "rms_norm", partial(norm.norm_forward, x, x, weight, None, 1e-5, True)
    yield "rms_norm", partial(norm.norm_backward, x, x, x, weight, rows[:0], rows, True)
    target, bias = torch.zeros(512, dtype=torch.long), torch.empty(10_000)
    for width in (128, 256):
        h, head = torch.empty(512, width, dtype=dtype), torch.empty(10_000, width, dtype=dtype)
        inputs = h, head, bias, target
        forward = linear_cross_entropy.linear_cross_entropy_forward
        backward = linear_cross_entropy.linear_cross_entropy_backward_weight
        for softcap in (None, 30.0) if width == 128 else (None,):
            name = f"linear_cross_entropy C={width}{'' if softcap is None else ' softcap'}"
            terms = -100, softcap, 1e-4, dtype
            yield name, partial(forward, *inputs, *terms, True)
            yield name, partial(backward, rows, *inputs, rows, *terms)


def main() -> None:
    found: list[Any] = []
    compile_instead_of_launching(lambda compiled, *_: found.append(compiled))
    chosen = calls(getattr(torch, sys.argv[2]))
    if "stock" in sys.argv:  # the first call shows it
        chosen = itertools.islice(chosen, 1)
    for name, call in chosen:
        call()
        for compiled in found:
            print(
                json.dumps(
                    {"arch": ARCH, "dtype": sys.argv[2], "case": name} | resources(compiled)
                ),
                flush=True,
            )
        found.clear()


if __name__ == "__main__":
    main()
