"""Writes the building interpreter's Unicode data as C++ tables.

Usage: python generate_unicode_tables.py OUTPUT_FOLDER
"""

import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

CODE_POINTS = 0x110000
BLOCK = 128  # code points that share one entry of a first stage

SPACE, CASED, CASE_IGNORABLE, EXPANDS = 1, 2, 4, 8
FINAL_SIGMA, CAPITAL_SIGMA = "\u03c2", "\u03a3"


def main(folder: str) -> None:
    write(
        Path(folder) / "unicode_tables.inc",
        [f'constexpr const char* kUnicodeVersion = "{unicodedata.unidata_version}";'],
    )
    write(Path(folder) / "case_tables.inc", case_tables())


def write(path: Path, lines: Iterable[str]) -> None:
    """Writes ``lines`` unless the file holds them already, so that nothing is rebuilt in vain."""
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def case_tables() -> list[str]:
    """What ``str.lower()`` and ``str.isspace()`` do to each code point, in two stages.

    ``kCaseRecords[kCaseStage2[kCaseStage1[c >> 7] * 128 + (c & 127)]]`` is what to add to ``c`` to
    lower-case it, and its flags.
    """
    records: dict[tuple[int, int], int] = {}
    expansions: dict[int, str] = {}
    indices = []
    for code_point in range(CODE_POINTS):
        char = chr(code_point)
        lower = char.lower()
        flags = SPACE * char.isspace() | case_context(char)
        if len(lower) == 1:
            delta = ord(lower) - code_point
        else:
            delta, flags = 0, flags | EXPANDS
            expansions[code_point] = lower
        indices.append(records.setdefault((delta, flags), len(records)))
    assert all(lower_bytes(chr(c).lower()) <= 4 for c in range(CODE_POINTS))
    stage1, stage2 = two_stages(indices)
    return [
        f"constexpr std::uint32_t kCaseBlock = {BLOCK};",
        f"constexpr std::uint8_t kSpace = {SPACE}, kCased = {CASED};",
        f"constexpr std::uint8_t kCaseIgnorable = {CASE_IGNORABLE}, kExpands = {EXPANDS};",
        "struct CaseRecord { std::int32_t delta; std::uint8_t flags; };",
        "struct Expansion { std::uint32_t from; std::uint8_t length; std::uint32_t to[3]; };",
        array("CaseRecord", "kCaseRecords", (f"{{{delta}, {flags}}}" for delta, flags in records)),
        array("Expansion", "kExpansions", (expansion(*item) for item in expansions.items())),
        array(smallest_type(stage1), "kCaseStage1", map(str, stage1)),
        array(smallest_type(stage2), "kCaseStage2", map(str, stage2)),
    ]


def case_context(char: str) -> int:
    """Whether ``char`` is cased or case-ignorable, read off how a sigma after it is lower-cased.

    A capital sigma becomes a final one where a cased letter stands before it, case-ignorable
    characters between them skipped. Characters that are both count as case-ignorable.
    """
    if (char + CAPITAL_SIGMA).lower().endswith(FINAL_SIGMA):
        return CASED
    if ("A" + char + CAPITAL_SIGMA).lower().endswith(FINAL_SIGMA):
        return CASE_IGNORABLE
    return 0


def lower_bytes(lower: str) -> int:
    return len(lower.encode("utf-8", "surrogatepass"))


def expansion(code_point: int, lower: str) -> str:
    assert len(lower) <= 3
    return f"{{{code_point}, {len(lower)}, {{{', '.join(str(ord(c)) for c in lower)}}}}}"


def two_stages(values: list[int]) -> tuple[list[int], list[int]]:
    """``values`` as a table of block numbers and the distinct blocks, one after the other."""
    blocks: dict[tuple[int, ...], int] = {}
    stage1 = [
        blocks.setdefault(tuple(values[start : start + BLOCK]), len(blocks))
        for start in range(0, len(values), BLOCK)
    ]
    return stage1, [value for block in blocks for value in block]


def smallest_type(values: list[int]) -> str:
    return "std::uint8_t" if max(values) < 256 else "std::uint16_t"


def array(cpp_type: str, name: str, values: Iterable[str]) -> str:
    return f"constexpr {cpp_type} {name}[] = {{{', '.join(values)}}};"


if __name__ == "__main__":
    main(sys.argv[1])
