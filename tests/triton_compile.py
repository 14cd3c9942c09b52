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
from tinylm.kernels.triton import (
    attention,
    attention_decode,
    linear_cross_entropy,
    norm,
    rotary,
    swiglu,
)

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
    for module in (attention_decode, norm, rotary):
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


Calls = Iterator[tuple[str, Callable[[], Any]]]
# (T, D) of attention: at the presets' shapes and the largest there are, and every kind of tile.
ATTENTION = (32, 32), (64, 64), (256, 32), (256, 64), (256, 128)
EVERY_ATTENTION = tuple(itertools.product((16, 32, 64, 256), (16, 32, 64, 128)))
EITHER = (False, True)


def calls(dtype: torch.dtype, every: bool) -> Calls:
    """What a training step calls at the presets' shapes; or every variant that has its own code."""
    yield from attention_calls(dtype, every)
    yield from decoding_calls(dtype, every)
    yield from norm_calls(dtype, every)
    yield from rotary_calls(dtype, every)
    yield from swiglu_calls(dtype, every)
    yield from cross_entropy_calls(dtype, every)


def attention_calls(dtype: torch.dtype, every: bool) -> Calls:
    largest = attention.LARGEST_HEAD_DIM[dtype]
    for T, D in EVERY_ATTENTION if every else ATTENTION:
        if largest < D:
            continue
        for documents, grouped, causal in itertools.product(EITHER, EITHER, (True, False)):
            usual = causal and not grouped and (not documents or (T, D) in ((64, 64), (256, 128)))
            if not every and not usual:  # with documents the fullest of each kind
                continue
            q, out, dout = (torch.empty(2, 4, T, D, dtype=dtype) for _ in range(3))
            kv = torch.empty(2, 2 if grouped else 4, T, D, dtype=dtype)
            start = torch.zeros(2, T, dtype=torch.int32) if documents else None
            name = f"attention T={T} D={D}{' documents' * documents}{' grouped' * grouped}"
            name += " not causal" * (not causal)
            inputs, terms = (q, kv, kv, start), (0.2, causal)
            yield name, partial(attention.attention_forward, *inputs, *terms)
            results = out.transpose(1, 2).contiguous(), torch.empty(2, 4, T)
            dout = dout.transpose(1, 2).contiguous()
            yield name, partial(attention.attention_backward, dout, *inputs, *results, *terms)


def decoding_calls(dtype: torch.dtype, every: bool) -> Calls:
    largest = attention.LARGEST_HEAD_DIM[dtype]
    for D in (16, 32, 64, 128) if every else (largest,):
        for padded, grouped in itertools.product(EITHER, EITHER) if every else ((True, True),):
            if largest >= D:
                q, kv = (torch.empty(1, h, s, D, dtype=dtype) for h, s in ((8, 1), (4, 4096)))
                q = q if grouped else q[:, :4]
                start = torch.zeros(1, 1, dtype=torch.int32) if padded else None
                name = f"decoding S=4096 D={D}{' padded' * padded}{' grouped' * grouped}"
                yield name, partial(attention.attention_forward, q, kv, kv, start, 0.2, True)


def norm_calls(dtype: torch.dtype, every: bool) -> Calls:
    for C in (32, 128, 256, 512, 1024, 2048, 4096) if every else (128,):
        weight, rows, x = torch.empty(C), torch.empty(512), torch.empty(512, C, dtype=dtype)
        for rms, alone in itertools.product(EITHER, EITHER if every else (False,)):
            name = f"{'rms' if rms else 'layer'}_norm C={C}{' alone' * alone}"
            residual, bias, mean = (
                None if alone else x,
                None if rms else weight,
                rows[: 0 if rms else 512],
            )
            yield name, partial(norm.norm_forward, x, residual, weight, bias, 1e-5, rms)
            yield name, partial(norm.norm_backward, x, residual, x, weight, mean, rows, rms)


def rotary_calls(dtype: torch.dtype, every: bool) -> Calls:
    for D in (16, 32, 64, 80, 128, 256) if every else (32, 64):
        x, rstd = torch.empty(2, 256, 6, D, dtype=dtype)[:, :, :4], torch.empty(2, 256, 4)
        weight, tables = torch.empty(4, D), (torch.empty(256, D), torch.empty(256, D))
        dout = torch.empty(2, 4, 256, D, dtype=dtype).transpose(1, 2)
        yield f"norm_rotary D={D}", partial(rotary.rotary_forward, x, weight, *tables, 1e-6)
        call = partial(rotary.rotary_backward, dout, x, weight, *tables, rstd)
        yield f"norm_rotary D={D}", call


def swiglu_calls(dtype: torch.dtype, every: bool) -> Calls:
    for F in (48, 384, 1023) if every else (384,):
        x, dout = torch.empty(512, 2 * F, dtype=dtype), torch.empty(512, F, dtype=dtype)
        yield f"swiglu F={F}", partial(swiglu.gated_forward, x)
        yield f"swiglu F={F}", partial(swiglu.gated_backward, dout, x)


def cross_entropy_calls(dtype: torch.dtype, every: bool) -> Calls:
    forward = linear_cross_entropy.linear_cross_entropy_forward
    backward = linear_cross_entropy.linear_cross_entropy_backward_weight
    rows, target = torch.empty(512), torch.zeros(512, dtype=torch.long)
    for C in (16, 32, 64, 128, 192, 256) if every else (128, 256):
        h, weight = torch.empty(512, C, dtype=dtype), torch.empty(10_000, C)
        for softcap, bias in itertools.product((None, 30.0), (torch.empty(10_000), None)):
            if not every and (bias is None or (softcap and C > 128)):
                continue
            name = f"linear_cross_entropy C={C}{' softcap' if softcap else ''}"
            name += " without bias" * (bias is None)
            inputs, terms = (h, weight, bias, target), (-100, softcap, 1e-4, dtype)
            yield name, partial(forward, *inputs, *terms, True)
            yield name, partial(backward, rows, *inputs, rows, *terms)
            if every:
                yield f"{name}, loss only", partial(forward, *inputs, *terms, False)


def main() -> None:
    found: list[Any] = []
    compile_instead_of_launching(lambda compiled, *_: found.append(compiled))
    chosen = calls(getattr(torch, sys.argv[2]), every="every" in sys.argv)
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
