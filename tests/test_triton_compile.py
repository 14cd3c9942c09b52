"""Budgets of the compiled Triton kernels on every architecture, without any GPU.

What is examined is what `triton_compile.py` finds. On 7.5 the matrix instructions are there only
through `tinylm.kernels.turing`.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("triton_compile.py")
KILOBYTE = 1024
# Shared memory of one program: 64 KB is all there is on 7.5, 99 KB on 8.9.
SHARED = {75: 64 * KILOBYTE, 80: 99 * KILOBYTE, 89: 99 * KILOBYTE, 90: 99 * KILOBYTE}
# By the shape of the instruction. On 9.0 the tiles of less than 64 rows use that of 8.0.
MATRIX_INSTRUCTIONS = {
    75: ("m16n8k8",),
    80: ("m16n8k16",),
    89: ("m16n8k16",),
    90: ("m64", "m16n8k16"),
}
TARGETS = [
    (75, "float16"), (80, "bfloat16"), (80, "float32"), (89, "bfloat16"), (90, "bfloat16")
]  # fmt: skip
# Two minutes for each, so by default only of the T4, whose limits are the tightest.
EVERYWHERE = os.environ.get("TINYLM_TEST_EVERY_KERNEL") == "1"
KERNELS = {
    "tinylm_attention_forward": 7, "tinylm_attention_backward": 3,
    "tinylm_attention_backward_dq": 4, "tinylm_attention_backward_dkdv": 4,
    "tinylm_attention_decode": 1, "tinylm_attention_combine": 1,
    "tinylm_norm_forward": 2, "tinylm_norm_backward": 2,
    "tinylm_norm_rotary_forward": 2, "tinylm_norm_rotary_backward": 2,
    "tinylm_swiglu_forward": 1, "tinylm_swiglu_backward": 1,
    "tinylm_linear_cross_entropy_forward": 3, "tinylm_linear_cross_entropy_dweight": 3,
}  # fmt: skip
# In fp32 a head of 64 positions is not one program's, nor are there heads of 128; no products of
# matrix instructions either.
IN_FP32 = {"tinylm_attention_forward": 5, "tinylm_attention_backward": 1}
WITHOUT_PRODUCTS = "tinylm_norm", "tinylm_swiglu", "tinylm_attention_combine"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compiled(arch: int, dtype: str, cache: Path, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, str(arch), dtype, *options],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5_000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def keeps_to_its_budget(kernel: dict[str, Any]) -> None:
    arch, name = kernel["arch"], kernel["kernel"]
    assert kernel["stack"] == 0, f"spills: {kernel}"
    assert kernel["shared"] <= SHARED[arch], kernel
    if kernel["dtype"] == "float32" or name.startswith(WITHOUT_PRODUCTS):
        assert kernel["mma"] == [], kernel
    else:
        assert kernel["mma"], kernel
        assert all(m.startswith(MATRIX_INSTRUCTIONS[arch]) for m in kernel["mma"]), kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), TARGETS)
def test_kernels_keep_to_their_budgets(arch: int, dtype: str, tmp_path: Path) -> None:
    kernels = compiled(arch, dtype, tmp_path)
    found = [kernel["kernel"] for kernel in kernels]
    in_fp32 = IN_FP32 if dtype == "float32" else {}
    assert {name: found.count(name) for name in found} == KERNELS | in_fp32
    for kernel in kernels:
        keeps_to_its_budget(kernel)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), TARGETS if EVERYWHERE else TARGETS[:1])
def test_every_variant_keeps_to_its_budget(arch: int, dtype: str, tmp_path: Path) -> None:
    """For every kind of call: a kernel that takes too much shared memory would not even start."""
    kernels = compiled(arch, dtype, tmp_path, "every")
    assert {kernel["kernel"] for kernel in kernels} == set(KERNELS)
    for kernel in kernels:
        keeps_to_its_budget(kernel)


@needs_triton
@pytest.mark.slow
def test_triton_by_itself_leaves_the_tensor_cores_of_7_5_idle(tmp_path: Path) -> None:
    """When this fails, Triton has learnt it, and `tinylm.kernels.turing` can go."""
    kernels = compiled(75, "float16", tmp_path, "stock")
    assert kernels
    assert all(kernel["mma"] == [] for kernel in kernels)


OWN = "tt.func public @tinylm_norm_forward(%arg0"
DOT = "%3 = tt.dot %1, %2, %0 : tensor<16x32x{}> * tensor<32x16x{}> -> tensor<16x16xf32>"


@needs_triton
def test_the_lowering_for_7_5_takes_only_fp16_products_of_our_kernels() -> None:
    from tinylm.kernels import turing

    fp16, fp32 = DOT.format("f16", "f16"), DOT.format("f32", "f32")
    assert turing.applies(f"{OWN}\n{fp16}\n{fp16}")
    assert not turing.applies(f"{OWN}\n{fp16}\n{fp32}")
    assert not turing.applies(OWN)
    assert not turing.applies(f"tt.func public @somebody_elses(%arg0\n{fp16}")
    with pytest.raises(RuntimeError, match="asynchronous copies"):
        turing.rewritten("ttg.async_copy_global_to_local")


@needs_triton
def test_the_lowering_leaves_another_hook_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from tinylm.kernels import turing

    seen = []

    def other(*arguments: Any) -> Any:
        seen.append(arguments)
        return "key", "hash"

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", other)
    turing.install()
    hook = knobs.runtime.add_stages_inspection_hook
    turing.install()
    assert knobs.runtime.add_stages_inspection_hook is hook
    key, _ = hook()
    assert "key" in key
    stages = {"ttir": None, "ttgir": "stock"}
    hook("backend", stages, None, None, 80)
    assert stages["ttgir"] == "stock"
    hook("backend", stages, None, None, 75)
    assert stages["ttgir"] != "stock"
    assert len(seen) == 3


class Probe:
    """Stands for the compiled probe: what it leaves in C, and its code."""

    def __init__(self, ptx: str, error: float) -> None:
        self.asm, self.error = {"ptx": ptx}, error

    def __getitem__(self, grid: Any) -> Any:
        def launch(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> "Probe":
            c.copy_(a.float() @ b.float().T + self.error)
            return self

        return launch


@needs_triton
@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (Probe("mma.sync.aligned.m16n8k8.row.col", 0), None),
        (Probe("mma.sync.aligned.m16n8k8.row.col", 1), "came out wrong"),
        (Probe("fma.rn.f32", 0), "does not use the tensor cores"),
        (None, "does not compile for 7.5"),
    ],
)
def test_the_lowering_is_believed_only_when_it_works(
    probe: Probe | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from tinylm.kernels import turing

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
    monkeypatch.setattr(turing, "tinylm_turing_probe", probe)
    turing._verified.cache_clear()
    refusal = turing.refusal(torch.device("cpu"))
    turing._verified.cache_clear()
    assert refusal is None if reason is None else reason in (refusal or "")
