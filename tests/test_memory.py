"""What is freed stays in the process while a CPU trains, and only then."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("tinylm._C")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")

# Page faults of 80 MiB in 20 tensors, the fifth time; pages held when all are freed, then after it.
SCRIPT = """
import resource
from pathlib import Path
import torch
from tinylm.device import choose_device, freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(2**20) for _ in range(20)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

with freed_memory_kept(choose_device("cpu")):
    for _ in range(20):  # the heap takes some rounds to lay itself out
        faults()
    print(faults(), pages())
print(pages())
"""
PAGES = 20 * 2**22 // os.sysconf("SC_PAGESIZE") if sys.platform == "linux" else 0


def faults_and_pages(**environment: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.check_output(command, env=clean | environment, text=True)
    return [int(number) for number in output.split()]


def test_freed_memory_is_kept_for_what_comes_next() -> None:
    faults, kept, afterwards = faults_and_pages()
    assert faults < PAGES / 10
    assert kept - afterwards > PAGES * 0.8


def test_the_environment_has_the_last_word() -> None:
    faults, *_ = faults_and_pages(MALLOC_MMAP_THRESHOLD_="65536")
    assert faults > PAGES * 0.9
