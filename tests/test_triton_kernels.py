"""Runs the tests of the Triton kernels: in Triton's interpreter, and on a GPU if there is one.

Each in a process of its own: the interpreter is chosen for good when a kernel is imported.
"""

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent
SUITE = [
    HERE / f"triton_{subject}.py"
    for subject in ("attention", "norm", "rotary", "swiglu", "cross_entropy", "operators")
]


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


def run_suite(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *SUITE]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")
    run_suite(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("arch", ["own", "sm75"])
def test_on_the_gpu(arch: str, tmp_path: Path) -> None:
    """As it is, and with the code that a T4 gets, which newer GPUs run too."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    # What cuBLAS wants, where the references ask torch for repeatable results.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if arch == "sm75":
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("this GPU runs no newer code")
        environment["TRITON_OVERRIDE_ARCH"] = arch
    run_suite(**environment)


def test_triton_is_imported_only_where_it_is_chosen() -> None:
    code = "import sys, tinylm.kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
