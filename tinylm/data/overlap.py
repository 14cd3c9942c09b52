"""How much of the validation split stands word for word in the training split."""

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import cast

import numpy as np
import numpy.typing as npt

CHUNK_TOKENS = 32
_WINDOWS_AT_ONCE = 1 << 20
_FILTER_BITS = 22

_Hashes = npt.NDArray[np.uint64]
_Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Overlap:
    """``found`` of ``chunks`` aligned chunks of 32 validation tokens occur in training."""

    chunks: int
    found: int

    @property
    def share(self) -> float | None:
        """``found / chunks``; ``None`` where the split is shorter than one chunk."""
        return self.found / self.chunks if self.chunks else None


def measure_overlap(valid: _Ids, train: _Ids) -> Overlap:
    """Counts the chunks ``valid[0:32]``, ``valid[32:64]``, ... that are anywhere in ``train``.

    Chunks are compared by 64-bit hashes: with 1e9 training tokens and 1e6 chunks, one false match
    is expected in 18,000 such runs. Memory is bounded by ``valid``; ``train`` is streamed.
    """
    chunks = np.concatenate(
        [hashes[::CHUNK_TOKENS] for hashes in _window_hashes(valid)] or [np.empty(0, np.uint64)]
    )
    wanted = np.unique(chunks)
    seen = np.zeros(len(wanted), dtype=bool)
    # Nearly all training windows miss; a table of the hashes' top bits dismisses them cheaply.
    possible = np.zeros(1 << _FILTER_BITS, dtype=bool)
    possible[_top_bits(wanted)] = True
    for hashes in _window_hashes(train) if len(wanted) else ():
        candidates = hashes[possible[_top_bits(hashes)]]
        place = np.searchsorted(wanted, candidates)
        place[place == len(wanted)] = 0
        seen[place[wanted[place] == candidates]] = True
    return Overlap(len(chunks), int(seen[np.searchsorted(wanted, chunks)].sum()))


def _top_bits(hashes: _Hashes) -> npt.NDArray[np.intp]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.intp)


def _window_hashes(ids: _Ids) -> Iterator[_Hashes]:
    """Hashes of the windows at every position, in pieces that begin at multiples of 32."""
    for start in range(0, len(ids) - CHUNK_TOKENS + 1, _WINDOWS_AT_ONCE):
        yield _hash_windows(_read(ids, start, _WINDOWS_AT_ONCE + CHUNK_TOKENS - 1))


def _read(ids: _Ids, start: int, count: int) -> _Ids:
    """``ids[start : start + count]``.

    Mapped files are read, not touched: touched pages would count as memory of this process.
    """
    # A slice of a map is a map too, but does not say where in the file it starts.
    base: object = ids.base
    if isinstance(ids, np.memmap) and isinstance(base, mmap) and ids.filename is not None:
        offset = ids.offset + start * ids.itemsize
        return cast(_Ids, np.fromfile(ids.filename, ids.dtype, count, offset=offset))
    return ids[start : start + count]


def _hash_windows(ids: _Ids) -> _Hashes:
    """Polynomial hash modulo 2^64 of each 32 ids, built by doubling: 1, 2, 4, ... 32 ids."""
    hashes = _mix(ids.astype(np.uint64))
    base, width = 0x9E3779B97F4A7C15, 1
    while width < CHUNK_TOKENS:
        power = np.uint64(pow(base, width, 1 << 64))
        hashes = hashes[:-width] * power + hashes[width:]
        width *= 2
    return _mix(hashes)


def _mix(x: _Hashes) -> _Hashes:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): spreads ids over all 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
