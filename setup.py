"""Builds ``tinylm._C``; everything declarative is in pyproject.toml.

torch is not needed to build. Without a working C++17 compiler the package still
installs: the pure-Python tokenizers take over and ``tinylm doctor`` says so.
Set ``TINYLM_REQUIRE_EXT=1`` to make a failed build an error instead.
"""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

GENERATED = Path("build") / "generated"


class BuildExtension(build_ext):
    """Generates the Unicode tables of the building interpreter, then compiles."""

    def build_extensions(self) -> None:
        GENERATED.mkdir(parents=True, exist_ok=True)
        generator = Path("csrc") / "generate_unicode_tables.py"
        subprocess.run([sys.executable, str(generator), str(GENERATED)], check=True)
        super().build_extensions()


def needs_recompile(object_file: str, source: str) -> bool:
    """Whether the source or any header is newer than the object file."""
    headers = glob("csrc/**/*.hpp", recursive=True) + glob(f"{GENERATED}/*.inc")
    newest = max(os.path.getmtime(path) for path in (source, *headers))
    return not os.path.exists(object_file) or os.path.getmtime(object_file) < newest


ParallelCompile("TINYLM_BUILD_JOBS", needs_recompile=needs_recompile).install()

# The fuzzers in csrc/fuzz are programs of their own: make fuzz.
sources = sorted({*glob("csrc/**/*.cpp", recursive=True)} - {*glob("csrc/fuzz/*.cpp")})

setup(
    ext_modules=[
        Pybind11Extension(
            "tinylm._C",
            sources,
            include_dirs=["csrc", str(GENERATED)],
            depends=sorted(glob("csrc/**/*.hpp", recursive=True)),
            cxx_std=17,
            extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-Wall", "-Wextra"],
            optional=os.environ.get("TINYLM_REQUIRE_EXT") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
