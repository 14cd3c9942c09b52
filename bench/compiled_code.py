"""The table of the compiled Triton kernels in docs/kernels.md; needs no GPU, takes a minute or two.

    python bench/compiled_code.py

Registers of a thread and KB of shared memory of a program, for the calls of the presets and the
largest there are, on each compute capability; what a kernel spills is said where it does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "tests" / "triton_compile.py"
TARGETS = {"7.5": "float16", "8.0": "bfloat16", "8.9": "bfloat16", "9.0": "bfloat16"}
PARTS = {
    "tinylm_attention_forward": "forward",
    "tinylm_attention_backward": "backward",
    "tinylm_attention_backward_dq": "dq",
    "tinylm_attention_backward_dkdv": "dk, dv",
    "tinylm_attention_decode": "parts",
    "tinylm_attention_combine": "combining",
    "tinylm_norm_forward": "forward",
    "tinylm_norm_backward": "backward",
    "tinylm_norm_rotary_forward": "forward",
    "tinylm_norm_rotary_backward": "backward",
    "tinylm_swiglu_forward": "forward",
    "tinylm_swiglu_backward": "backward",
    "tinylm_linear_cross_entropy_forward": "loss, dh",
    "tinylm_linear_cross_entropy_dweight": "dweight",
}


def compiled(capability: str, dtype: str) -> dict[str, str]:
    """Registers and shared memory of each kernel, by what the table calls it."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), capability.replace(".", ""), dtype]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    kernels: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        f"{kernel['case'].replace('_', ' ').replace('=', ' ')}: {PARTS[kernel['kernel']]}": (
            f"{kernel['registers']}, {kernel['shared'] / 1024:.3g}"
            + f", spills {kernel['stack']} bytes" * bool(kernel["stack"])
        )
        for kernel in kernels
    }


def main() -> None:
    columns = {capability: compiled(capability, dtype) for capability, dtype in TARGETS.items()}
    print("| kernel |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for kernel in columns["7.5"]:
        print(f"| {kernel} |", " | ".join(column[kernel] for column in columns.values()), "|")


if __name__ == "__main__":
    main()
