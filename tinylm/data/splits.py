"""Which documents are for validation: decided by their text alone, so the same everywhere."""

from hashlib import blake2b


def to_bytes(text: str) -> bytes:
    """UTF-8 of any `str`; lone surrogates, which JSON escapes may spell, keep three bytes each."""
    return text.encode("utf-8", "surrogatepass")


def is_validation(data: bytes, fraction: float) -> bool:
    """Whether the document with UTF-8 ``data`` is among the ``fraction`` held out.

    The first 8 bytes of its BLAKE2b hash, as a number in [0, 1), are compared with ``fraction``.
    Equal documents have equal hashes: exact duplicates never straddle the split, and a document
    keeps its side when others are added.
    """
    first = int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
    return first < fraction * 2**64
