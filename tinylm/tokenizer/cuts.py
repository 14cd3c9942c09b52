"""Cutting a text that is too long for memory where its parts have the ids of the whole.

That is where something always ends, whatever stands around it:

- Before a space that follows anything but white space. No piece of any pattern goes on from there
  to a space, and the piece that ends there ends there in the part too, as what patterns look ahead
  for is no more likely at the end of a text. To the word tokenizer, a space is between words, and
  what lower-cases a sigma does not look beyond it.
- After a single newline between characters that are no white space, the second no slash (which
  ``o200k`` takes along with the newline). The newline is a piece of its own or ends that of the
  punctuation before it; no piece that begins with other characters begins with a newline.
"""

import re
from collections.abc import Iterable, Iterator

_BEFORE_SPACE = r"(?<=\S)(?= )"
_AFTER_NEWLINE = r"(?<=\S\n)(?=[^\s/])"
# So much of the end of a text is searched first, as the last place is wanted.
_TAIL = 1 << 10


def parts_of(chunks: Iterable[str], size: int, prefixed: bool = False) -> Iterator[str]:
    """The text that comes in ``chunks`` in parts of at least ``size`` characters, the last apart.

    They are as much longer as it takes to find a place to cut. ``prefixed``: the tokenizer puts a
    space before texts that begin without one, so parts must begin with one.
    """
    place = re.compile(_BEFORE_SPACE if prefixed else f"{_BEFORE_SPACE}|{_AFTER_NEWLINE}")
    buffer, searched = "", 0
    for chunk in chunks:
        buffer += chunk
        if len(buffer) < size:
            continue
        end = _last_place(place, buffer, searched)
        # What follows may make a place of the last two characters.
        searched = max(0, len(buffer) - 2)
        if end is not None:
            yield buffer[:end]
            buffer, searched = buffer[end:], 0
    if buffer:
        yield buffer


def _last_place(place: re.Pattern[str], text: str, searched: int) -> int | None:
    tail = _TAIL
    while True:
        start = max(searched, len(text) - tail)
        if found := [match.start() for match in place.finditer(text, start)]:
            return found[-1]
        if start == searched:
            return None
        tail *= 8
