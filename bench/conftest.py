"""What all benchmarks of tokenizers share: the text, and how results are reported.

``TINYLM_BENCH_DATA`` names a ``.jsonl.gz`` file of documents (field ``text``); without it, the
sources of Python's standard library are the text. ``TINYLM_BENCH_MB`` (20) says how much of it is
used.
"""

import gzip
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def documents() -> Iterator[str]:
    """Texts without lone surrogates, which not every tokenizer can take."""
    if path := os.environ.get("TINYLM_BENCH_DATA"):
        with gzip.open(path, "rb") as file:
            texts = (json.loads(line)["text"] for line in file if line.strip())
            yield from (t for t in texts if not any("\ud800" <= c <= "\udfff" for c in set(t)))
        return
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_bytes().decode("utf-8", "replace")


@pytest.fixture(scope="session")
def texts():
    limit = float(os.environ.get("TINYLM_BENCH_MB", "20")) * 1e6
    chosen, size = [], 0
    for text in documents():
        if size >= limit:
            break
        chosen.append(text)
        size += len(text.encode())
    return chosen


@pytest.fixture(scope="session")
def megabytes(texts):
    return sum(len(text.encode()) for text in texts) / 1e6


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.fixture
def report(benchmark, megabytes):
    """Adds throughput and circumstances to a benchmark that has run."""

    def add(**info):
        if benchmark.stats is None:  # --benchmark-disable
            return
        benchmark.extra_info.update(
            megabytes=round(megabytes, 3),
            megabytes_per_second=round(megabytes / benchmark.stats.stats.min, 2),
            machine=platform.machine(),
            **{package: version_of(package) for package in ("tokenizers", "tiktoken")},
            **info,
        )

    return add
