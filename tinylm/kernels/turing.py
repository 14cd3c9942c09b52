"""Tensor cores on compute capability 7.5 (the T4) with an unmodified Triton.

Triton compiles ``tl.dot`` on 7.5 to scalar multiply-adds that spill, though everything below its
own GPU dialect still knows that generation's matrix instruction, ``mma.m16n8k8``. So at the one
stage that gives up, this lowers a kernel as for capability 8.0, without its asynchronous copies
(``num_stages=1``), and then writes 7.5 and its version of the instruction, 2.1, into the result.
The stages after it do the rest.

It is narrow on purpose: only kernels named ``tinylm_…``, only 7.5, only if all their products are
fp16. And nothing is believed: before it is used, a small product has to contain the instruction
and to come out right on the present GPU, else the operators run in torch and say why.
"""

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir

from tinylm.kernels.dispatch import decided_while_tracing
from tinylm.kernels.triton.common import on_device

CAPABILITY = 75
INSTRUCTION = "m16n8k8"
OLDEST_TRITON = (3, 6)
_DOT_OPERANDS = re.compile(r"tt\.dot .*?: tensor<[0-9x]+x(\w+)> \* tensor<[0-9x]+x(\w+)>")
_OWN_KERNEL = re.compile(r"tt\.func public @tinylm_")
# Part of the key of Triton's cache, so that code compiled without this is not taken for ours.
_KEY = "tinylm-turing-1"

Hook = Callable[..., Any]


def applies(ttir: str) -> bool:
    """Whether a module is one of our kernels and all its products, at least one, are fp16."""
    operands = _DOT_OPERANDS.findall(ttir)
    ours = _OWN_KERNEL.search(ttir) is not None
    return ours and bool(operands) and all(pair == ("f16", "f16") for pair in operands)


def rewritten(ttgir: str) -> str:
    """A module lowered for 8.0 as one for 7.5."""
    if "async_copy" in ttgir:
        raise RuntimeError("Triton made asynchronous copies, which compute capability 7.5 lacks")
    ttgir = ttgir.replace(
        "versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1"
    )
    return ttgir.replace('ttg.target = "cuda:80"', f'ttg.target = "cuda:{CAPABILITY}"')


def install() -> None:
    """Puts the lowering into this process's Triton, after a hook that is there already."""
    before = knobs.runtime.add_stages_inspection_hook
    if getattr(before, "is_tinylm", False):
        return
    if _version() < (3, 7):  # does not ask the hook for its part of the key
        knobs.cache.dir = str(Path(knobs.cache.dir) / _KEY)
    hook = _make_hook(before)
    hook.is_tinylm = True  # type: ignore[attr-defined]
    knobs.runtime.add_stages_inspection_hook = hook


def _make_hook(before: Hook | None) -> Hook:
    def hook(
        self: Any = None,
        stages: Any = None,
        options: Any = None,
        language: Any = None,
        capability: int | None = None,
    ) -> Any:
        if self is None:  # asked for its part of the cache key
            key = _KEY + (before()[0] if before else "")
            return key, hashlib.sha256(key.encode()).hexdigest()
        if before:
            before(self, stages, options, language, capability)
        if capability == CAPABILITY and "ttir" in stages:
            stages["ttgir"] = _make_stage(self, options, stages["ttgir"])
        return None

    return hook


def _make_stage(backend: Any, options: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    def ttgir(module: Any, metadata: Any) -> Any:
        if not applies(str(module)):
            return stock(module, metadata)
        single = dataclasses.replace(options, num_stages=1)
        lowered = backend.make_ttgir(module, metadata, single, 80)
        with tempfile.TemporaryDirectory() as folder:  # Triton parses files, not strings
            path = Path(folder) / "module.ttgir"
            path.write_text(rewritten(str(lowered)), encoding="utf-8")
            result = ir.parse_mlir_module(str(path), lowered.context)
        result.context = lowered.context
        return result

    return ttgir


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def tinylm_turing_probe(A: Any, B: Any, C: Any) -> None:
    """C = A Bᵀ, 32 × 32."""
    at = tl.arange(0, 32)
    place = at[:, None] * 32 + at[None, :]
    tl.store(C + place, tl.dot(tl.load(A + place), tl.trans(tl.load(B + place))))


@decided_while_tracing
def refusal(device: torch.device) -> str | None:
    """Why products cannot run on the tensor cores of this 7.5 device; None if they do."""
    return _verified(device)


@cache
def _verified(device: torch.device) -> str | None:
    if _version() < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"compute capability 7.5 needs Triton {oldest}, this is {triton.__version__}"
    install()
    # Small whole numbers: exact in fp16, and their products in fp32.
    a, b = (torch.arange(1024, device=device).mul(n).remainder(11).view(32, 32) for n in (5, 7))
    c = torch.full((32, 32), float("nan"), device=device)
    try:
        with on_device(c):
            compiled = tinylm_turing_probe[(1,)](a.half(), b.half(), c)
    except Exception as error:  # whatever a version that this does not know does
        return f"Triton {triton.__version__} does not compile for 7.5 ({type(error).__name__})"
    if INSTRUCTION not in compiled.asm["ptx"]:
        return f"Triton {triton.__version__} does not use the tensor cores of 7.5"
    if not torch.equal(c, a.float() @ b.float().T):
        return f"a product compiled by Triton {triton.__version__} for 7.5 came out wrong"
    return None
