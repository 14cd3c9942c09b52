"""Ids of BPE and where they stand in their text: one at a time, or all with their places."""

import codecs
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError


class StreamDecoder:
    """Decodes ids one at a time and gives out characters only once they are whole."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that ``token_id`` completes; often the empty string in some scripts.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        check_id(token_id, self._tokens)
        return self._decoder.decode(self._tokens[token_id])

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, else the empty string.

        All that was pushed and this, joined, is what `BPETokenizer.decode` gives for the ids.
        """
        return self._decoder.decode(b"", final=True)


def check_id(token_id: int, tokens: Sequence[bytes]) -> None:
    """Raises `InputError` unless ``token_id`` is a token's."""
    if not 0 <= token_id < len(tokens) or not tokens[token_id]:
        raise InputError(f"id {token_id} is not in the vocabulary of {len(tokens)}")


def in_characters(spans: npt.NDArray[np.int64], utf8: bytes) -> npt.NDArray[np.int64]:
    """Spans of bytes as the characters that they touch. [n, 2]"""
    is_first = (np.frombuffer(utf8, dtype=np.uint8) & 0xC0) != 0x80
    before = np.concatenate([[0], np.cumsum(is_first)])  # how many begin before each byte
    starts, ends = spans.T
    # A start inside a character goes back to the one that has begun.
    inside = np.append(~is_first, False)[starts]
    return np.stack([before[starts] - inside, before[ends]], axis=1)
