"""The T4's compiled kernels, run without a T4: right, within their tensors, and free of races."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_emulator import Kernel, Segment

SCRIPT = Path(__file__).with_name("triton_emulate.py")
TOLERANCE = 2e-3  # fp16 products, rounded to fp16, relative to the largest value
WITHOUT_PRODUCTS = "layer norm", "norm and rotary", "swiglu"

HEADER = """.visible .entry test(
	.param .u64 .ptr .global .align 1 test_param_0,
	.param .u64 .ptr .global .align 1 test_param_1
)
.reqntid {threads}
{{
	.reg .b32 %r<99>;
"""
ADDRESS = """
	ld.param.b64 %rd1, [test_param_{parameter}];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, {bytes};
	add.s64 %rd{register}, %rd1, %rd2;
"""


def run(body: str, *arrays: np.ndarray[Any, Any], threads: int = 32) -> None:
    """Runs PTX whose parameters are the arrays, which lie apart in memory."""
    segments = [Segment(1024 * (i + 1), a.reshape(-1).view(np.uint8)) for i, a in enumerate(arrays)]
    kernel = Kernel(HEADER.format(threads=threads) + body + "\n\tret;\n}\n")
    kernel.run((1,), [s.address for s in segments], segments, 1024)


def at(parameter: int, size: int, register: int) -> str:
    return ADDRESS.format(parameter=parameter, bytes=size, register=register)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_the_kernels_of_the_t4_are_right(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "75", "float16"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5_000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    release = tuple(int(part) for part in version("triton").split(".")[:2])
    for case in cases:
        assert max(case["errors"]) < TOLERANCE, case
        assert ("mma" in case["counts"]) != case["case"].startswith(WITHOUT_PRODUCTS), case
        # Triton 3.9 lets threads store copies of a sum that differ in the last bit: which of them
        # stays is up to the hardware.
        assert "inexact copies" not in case["counts"] or release >= (3, 8), case
    ran = {kernel for case in cases for kernel in case["counts"]} - {"mma", "inexact copies"}
    assert ran == {
        "tinylm_attention_forward", "tinylm_attention_backward",
        "tinylm_attention_backward_dq", "tinylm_attention_backward_dkdv",
        "tinylm_attention_decode", "tinylm_attention_combine",
        "tinylm_norm_forward", "tinylm_norm_backward",
        "tinylm_norm_rotary_forward", "tinylm_norm_rotary_backward",
        "tinylm_swiglu_forward", "tinylm_swiglu_backward",
        "tinylm_linear_cross_entropy_forward", "tinylm_linear_cross_entropy_dweight",
    }  # fmt: skip


def test_the_matrix_instruction_takes_fragments_as_the_manual_draws_them() -> None:
    """Thread 4 g + t has A and C at [g, 2t:2t+2] and [g+8, 2t:2t+2], and B[2t:2t+2, g]."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-9, 9, shape).astype(np.float16) for shape in ((16, 8), (8, 8)))
    c = generator.integers(-9, 9, (16, 8)).astype(np.float32)
    inputs = np.zeros((32, 8), np.uint32)  # a0, a1, b0, a pad, c0 … c3 of each thread
    for thread in range(32):
        g, pair = thread // 4, slice(2 * (thread % 4), 2 * (thread % 4) + 2)
        halves = np.concatenate([a[g, pair], a[g + 8, pair], b[pair, g]])
        inputs[thread, :3] = halves.view(np.uint32)
        inputs[thread, 4:] = np.concatenate([c[g, pair], c[g + 8, pair]]).view(np.uint32)
    out, sums = np.zeros((32, 4), np.float32), "{%r6, %r7, %r8, %r9}"
    run(
        at(0, 32, 3) + at(1, 16, 4) + f"""
	ld.global.v4.b32 {{ %r2, %r3, %r4, %r5 }}, [ %rd3 + 0 ];
	ld.global.v4.b32 {sums}, [ %rd3 + 16 ];
	mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {sums}, {{%r2, %r3}}, {{%r4}}, {sums};
	st.global.v4.b32 [ %rd4 + 0 ], {sums};
""",
        inputs, out,
    )  # fmt: skip
    expected = a.astype(np.float32) @ b.astype(np.float32) + c
    for thread in range(32):
        g, pair = thread // 4, slice(2 * (thread % 4), 2 * (thread % 4) + 2)
        assert (out[thread] == np.concatenate([expected[g, pair], expected[g + 8, pair]])).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_rows_or_columns(transposed: bool) -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros((32, 2), np.uint16)
    run(
        at(0, 4, 3) + at(1, 4, 4) + f"""
	ld.global.b32 %r2, [ %rd3 + 0 ];
	shl.b32 %r3, %r1, 2;
	st.shared.b32 [ %r3 + 0 ], %r2;
	bar.sync 0;
	and.b32 %r4, %r1, 7;
	shl.b32 %r5, %r4, 4;
	ldmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 {{%r6}}, [%r5];
	st.global.b32 [ %rd4 + 0 ], %r6;
""",
        matrix, out,
    )  # fmt: skip
    assert (out.reshape(8, 8) == (matrix.T if transposed else matrix)).all()


EXCHANGE = """
	shl.b32 %r2, %r1, 2;
	st.shared.b32 [ %r2 + 0 ], %r1;
	{barrier}
	xor.b32 %r3, %r2, 128;
	ld.shared.b32 %r4, [ %r3 + 0 ];
	st.global.b32 [ %rd3 + 0 ], %r4;
"""


def test_a_missing_barrier_is_found() -> None:
    """Two warps exchange values; within a warp, threads wait for each other anyway."""
    out = np.zeros(64, np.uint32)
    run(at(0, 4, 3) + EXCHANGE.format(barrier="bar.sync 0;"), out, threads=64)
    assert (out == np.arange(64) ^ 32).all()
    with pytest.raises(RuntimeError, match="reads what another has written without a barrier"):
        run(at(0, 4, 3) + EXCHANGE.format(barrier=""), out, threads=64)


def test_an_access_beyond_the_tensors_is_found() -> None:
    store = "\tst.global.b32 [ %rd3 + 0 ], %r1;"
    run(at(0, 4, 3) + store, np.zeros(32, np.uint32))
    with pytest.raises(RuntimeError, match="beyond every tensor"):
        run(at(0, 4, 3) + store, np.zeros(31, np.uint32))
    guarded = "\tsetp.lt.s32 %p1, %r1, 31;\n\t@%p1 st.global.b32 [ %rd3 + 0 ], %r1;"
    run(at(0, 4, 3) + guarded, np.zeros(31, np.uint32))


def test_an_unknown_instruction_is_named() -> None:
    for unknown in ("brev.b32 %r2, %r1", "mul.hi.u32 %r2, %r1, %r1"):
        with pytest.raises(NotImplementedError, match=re.escape(f"unknown instruction: {unknown}")):
            run(f"\tmov.u32 %r1, %tid.x;\n\t{unknown};", np.zeros(1, np.uint32))
