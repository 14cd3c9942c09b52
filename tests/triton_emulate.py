"""Runs the kernels' PTX for the T4 in an emulator: ``triton_emulate.py 75 float16``.

The operators are called on CPU tensors, as ever; each launch is compiled for 7.5 through
`tinylm.kernels.turing` and its PTX run by `ptx_emulator.py` in the tensors' own memory. Prints one
JSON object per case: the largest error of outputs and gradients against fp64, relative to the
largest value, and how often the tensor cores were used. `test_ptx_emulator.py` reads it.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ptx_emulator import Kernel, Segment
from torch import Tensor
from triton_compile import compile_instead_of_launching

from tinylm import kernels
from tinylm.kernels import dispatch

counts: Counter[str] = Counter()
DTYPE = getattr(torch, sys.argv[2])


def segment(x: Tensor) -> Segment:
    """The memory from the first to the last element of ``x``."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided((elements,), (1,)).view(torch.uint8)
    return Segment(x.data_ptr(), flat.numpy())


def emulate(compiled: Any, grid: Any, args: Any, kwargs: Any) -> None:
    signature = compiled.src.signature
    values = [v for v, kind in zip(args, signature.values(), strict=False) if kind != "constexpr"]
    segments = [segment(v) for v in values if isinstance(v, Tensor) and v.numel()]
    numbers = [v.data_ptr() if isinstance(v, Tensor) else v for v in values]
    ran = Kernel(compiled.asm["ptx"]).run(
        grid, [*numbers, 0, 0], segments, compiled.metadata.shared
    )
    for opcode, n in ran.items():
        if opcode.startswith("mma.sync.aligned.m16n8k8"):
            counts["mma"] += n
        if opcode == "inexact copies" and n:
            counts[opcode] += n
    counts[compiled.metadata.name] += 1


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def attention(T: int, S: int, heads: tuple[int, int], D: int, start: Any = None) -> Any:
    q = randn(1, heads[0], T, D)
    k, v = (randn(1, heads[1], S, D, seed=i) for i in (1, 2))
    start_BT = None if start is None else torch.tensor(start, dtype=torch.int32)

    def call(backend: str, *qkv: Tensor) -> Tensor:
        return kernels.causal_attention(*qkv, start_BT=start_BT, backend=backend)

    return call, (q, k, v), ("triton", "matmul")


def cross_entropy(N: int, V: int, C: int, softcap: float | None) -> Any:
    targets = torch.arange(N) * 7 % V
    targets[1::5] = -100

    def call(backend: str, *inputs: Tensor) -> Tensor:
        h, weight, bias = inputs
        loss = kernels.linear_cross_entropy(
            h, weight, targets, bias_V=bias, softcap=softcap, z_loss=1e-2, backend=backend
        )
        return loss * 1000  # as by a loss scale

    inputs = randn(N, C) / math.sqrt(C), randn(V, C, seed=1), randn(V, seed=2)
    return call, inputs, ("triton", "reference")


def layer_norm(N: int, C: int) -> Any:
    def call(backend: str, *inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        return kernels.layer_norm(x, weight, bias, backend=backend)

    return call, (randn(N, C), randn(C, seed=1), randn(C, seed=2)), ("triton", "reference")


def norm_rotary(T: int, H: int, D: int) -> Any:
    tables = kernels.rotary_tables(T, D, 100.0)

    def call(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        return kernels.norm_rotary(x, weight, *tables, backend=backend)

    return call, (randn(2, T, H, D), randn(H, D, seed=1)), ("triton", "separate")


def swiglu(N: int, F: int) -> Any:
    def call(backend: str, x: Tensor) -> Tensor:
        return kernels.swiglu(x, backend=backend)

    return call, (randn(N, 2 * F),), ("triton", "torch")


def cases() -> Iterator[tuple[str, Any, bool]]:
    """Name, operator with its inputs, and whether the gradients are taken too."""
    yield "whole head", attention(31, 31, (1, 1), 32), True
    yield "whole head, documents", attention(20, 20, (2, 1), 32, [0] * 7 + [7] * 13), True
    yield "whole head, grouped", attention(40, 40, (2, 1), 32), True
    yield "tiles", attention(70, 70, (1, 1), 32), True
    yield "tiles, grouped", attention(33, 33, (2, 1), 64), True
    yield "tiles, documents", attention(100, 100, (1, 1), 32, [0] * 66 + [66] * 34), True
    yield "head dimension 64", attention(70, 70, (1, 1), 64), False
    yield "decoding", attention(1, 50, (2, 1), 32), False
    yield "decoding, split", attention(2, 400, (2, 1), 32, [300]), False
    yield "cross-entropy", cross_entropy(70, 45, 64, None), True
    yield "cross-entropy, softcap", cross_entropy(40, 45, 24, 3.0), True
    yield "layer norm", layer_norm(9, 48), True
    yield "norm and rotary", norm_rotary(9, 3, 32), True
    yield "norm and rotary, odd width", norm_rotary(7, 1, 20), True
    yield "swiglu", swiglu(9, 48), True
    yield "swiglu, odd width", swiglu(31, 33), True


def outputs(call: Callable[..., Tensor], backend: str, inputs: Any, gradients: bool) -> Any:
    inputs = [x.detach().requires_grad_(gradients) for x in inputs]
    out = call(backend, *inputs)
    if not gradients:
        return [out]
    dout = randn(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(np.nan_to_num(difference.item(), nan=math.inf))


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written
    compile_instead_of_launching(emulate)
    dispatch.triton_refusal = lambda device_type: None
    for name, (call, inputs, (own, reference)), gradients in cases():
        counts.clear()
        actual = outputs(call, own, inputs, gradients)
        expected = outputs(call, reference, [x.double() for x in inputs], gradients)
        errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
        print(json.dumps({"case": name, "errors": errors, "counts": counts}), flush=True)


if __name__ == "__main__":
    main()
