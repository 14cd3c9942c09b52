"""Writes the ranges of letters, marks, numbers and white space that splitting patterns use.

Usage: python csrc/generate_unicode_classes.py [UNICODE_VERSION]

Token ids must not depend on the interpreter that happens to run, so the two files
written here are committed: ``csrc/unicode_class_ranges.hpp`` for C++ and
``tinylm/tokenizer/unicode_classes.py`` for the Python reference. The source is the
Unicode Character Database of exactly the version asked for, through ``unicodedata``
(Python 3.14 has 16.0.0) or the ``unicodedata2`` package of that version.
"""

import sys
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path

DEFAULT_VERSION = "16.0.0"
ROOT = Path(__file__).resolve().parent.parent

# The White_Space property, unchanged since Unicode 6.3; unicodedata does not offer it.
WHITE_SPACE = frozenset(
    [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]
) | {0x205F, 0x3000}

# General categories that the patterns only ever name together share a class.
CATEGORIES = {
    "Upper": ("Lu", "Lt"),
    "Lower": ("Ll",),
    "Uncased": ("Lm", "Lo"),
    "Mark": ("Mn", "Mc", "Me"),
    "Number": ("Nd", "Nl", "No"),
}

# First, last, step. The step is 2 where upper and lower case take turns.
Ranges = list[tuple[int, int, int]]


def category_of(version: str) -> Callable[[str], str]:
    """``unicodedata.category`` of Unicode ``version``, from whichever module has it."""
    if unicodedata.unidata_version == version:
        return unicodedata.category
    try:
        import unicodedata2
    except ImportError:
        sys.exit(f"this Python has Unicode {unicodedata.unidata_version}; install unicodedata2")
    if unicodedata2.unidata_version != version:
        sys.exit(f"unicodedata2 has Unicode {unicodedata2.unidata_version}, not {version}")
    return unicodedata2.category  # type: ignore[no-any-return]


def ranges_where(holds: Callable[[int], bool]) -> Ranges:
    """The code points where ``holds``, as inclusive ranges in rising order."""
    ranges: Ranges = []
    for code_point in filter(holds, range(sys.maxunicode + 1)):
        first, last, step = ranges[-1] if ranges else (0, -3, 1)
        gap = code_point - last
        if gap == step or (first == last and gap == 2):
            ranges[-1] = (first, code_point, gap)
        else:
            ranges.append((code_point, code_point, 1))
    return ranges


def cpp_text(version: str, classes: dict[str, Ranges]) -> str:
    """A header with one array of inclusive ranges per class."""
    blocks = []
    for name, ranges in classes.items():
        items = " ".join(
            f"{{0x{first:X},0x{last:X}{',2' * (step == 2)}}}," for first, last, step in ranges
        )
        body = textwrap.fill(items, 98, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"constexpr CodePointRange k{name}Ranges[] = {{\n{body}\n}};\n")
    return (
        f"// Written by generate_unicode_classes.py from Unicode {version}; do not edit.\n"
        "#pragma once\n\n#include <cstdint>\n\nnamespace tinylm {\n\n"
        "struct CodePointRange {\n  std::uint32_t first, last;\n  std::uint32_t step = 1;\n};\n\n"
        f'constexpr const char* kClassesUnicodeVersion = "{version}";\n\n'
        "// clang-format off\n"
        + "\n".join(blocks)
        + "// clang-format on\n\n}  // namespace tinylm\n"
    )


def python_text(version: str, classes: dict[str, Ranges]) -> str:
    """A module with one string of hexadecimal ranges per class."""
    blocks = []
    for name, ranges in classes.items():
        items = " ".join(f"{first:X}-{last:X}{'/2' * (step == 2)}" for first, last, step in ranges)
        body = textwrap.fill(items, 98, break_on_hyphens=False)
        blocks.append(f'{name.upper()} = """\n{body}\n"""\n')
    return (
        f'"""Inclusive hexadecimal ranges of Unicode {version}; "/2" takes every other one.\n\n'
        'Written by csrc/generate_unicode_classes.py; do not edit.\n"""\n\n'
        f'UNICODE_VERSION = "{version}"\n\n' + "\n".join(blocks)
    )


def main(version: str) -> None:
    category = category_of(version)
    categories = [category(chr(code_point)) for code_point in range(sys.maxunicode + 1)]
    classes = {
        name: ranges_where(lambda code_point, members=members: categories[code_point] in members)
        for name, members in CATEGORIES.items()
    }
    classes["Space"] = ranges_where(WHITE_SPACE.__contains__)
    outputs = {
        ROOT / "csrc" / "unicode_class_ranges.hpp": cpp_text(version, classes),
        ROOT / "tinylm" / "tokenizer" / "unicode_classes.py": python_text(version, classes),
    }
    for path, text in outputs.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [DEFAULT_VERSION]))
