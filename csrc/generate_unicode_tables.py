"""Writes ``unicode_tables.inc``: the building interpreter's Unicode data as C++ tables.

Usage: python generate_unicode_tables.py OUTPUT_FOLDER
"""

import sys
import unicodedata
from pathlib import Path


def main(folder: str) -> None:
    lines = [f'constexpr const char* kUnicodeVersion = "{unicodedata.unidata_version}";']
    path = Path(folder) / "unicode_tables.inc"
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
