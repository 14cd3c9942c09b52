"""Which windows of the token stream make up which batch: a pure function of seed and step.

There is no shuffled list to keep, save or restore. Resuming needs only the step, and a corpus of
billions of tokens needs no more memory than a small one.
"""

import numpy as np

from tinylm.errors import InputError

_MASK64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """A good 64-bit hash of each value: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: np.ndarray = x ^ (x >> np.uint64(31))
    return out


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a random permutation of 0 … n - 1, chosen by ``key``, sends each index.

    A four-round Feistel network permutes the next power of four; a value that lands outside is
    sent through again until it lands inside (cycle walking, Black and Rogaway 2002), on average
    fewer than four times.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix(np.arange(4, dtype=np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15) & _MASK64))
    out = index.astype(np.uint64)
    pending = np.ones(out.shape, dtype=bool)
    while pending.any():
        left, right = out[pending] >> half, out[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[pending] = left << half | right
        pending = out >= np.uint64(n)
    return out.astype(np.int64)


class WindowSampler:
    """Batches of windows from a token stream, every window once an epoch, in random order.

    Windows start ``stride`` tokens apart. When windows do not overlap, each epoch also shifts
    all of them by a random offset, so that later epochs cut the text in other places.

    Args:
        tokens: the stream, any unsigned integer type, memory-mapped or not.
        seq_len: tokens in a window T.
        batch_size: windows in a batch B.

    Raises:
        InputError: the stream is shorter than one window and its targets.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        batch_size: int,
        stride: int | None = None,
        seed: int = 0,
    ) -> None:
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.stride = stride or seq_len
        spare = len(tokens) - seq_len - 1
        if spare < 0:
            raise InputError(
                f"the training split has {len(tokens):,} tokens, fewer than one window of "
                f"{seq_len} and its target; use more text or a smaller --seq-len"
            )
        # The shift never costs a window: it only uses what the last window leaves over.
        self.windows = spare // self.stride + 1
        self.shifts = min(self.stride, spare - (self.windows - 1) * self.stride + 1)
        if self.stride >= seq_len and self.windows > 1:
            self.windows -= 1  # give every offset up to a whole stride
            self.shifts = self.stride

    @property
    def steps_per_epoch(self) -> float:
        return self.windows / self.batch_size

    def starts(self, step: int, share: int = 0, shares: int = 1) -> np.ndarray:
        """First tokens of the windows of one batch (int64, B), or of one of its equal shares."""
        size = self.batch_size // shares
        first = step * self.batch_size + share * size
        return self._starts(np.arange(first, first + size, dtype=np.int64))

    def starts_of_steps(self, step: int, count: int) -> np.ndarray:
        """First tokens of the windows of ``count`` batches from ``step`` on (int64, count × B)."""
        first, end = (n * self.batch_size for n in (step, step + count))
        return self._starts(np.arange(first, end, dtype=np.int64)).reshape(count, -1)

    def _starts(self, sample: np.ndarray) -> np.ndarray:
        epoch, index = np.divmod(sample, self.windows)
        starts = np.empty_like(sample)
        for e in np.unique(epoch):
            chosen = epoch == e
            key = self.seed * 1_000_003 + int(e)
            shift = int(_mix(np.array([key & _MASK64], dtype=np.uint64))[0]) % self.shifts
            starts[chosen] = shuffled(index[chosen], self.windows, key) * self.stride + shift
        return starts

    def batch(self, step: int, share: int = 0, shares: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and their next tokens of one step, both int64 (B, T).

        Where several processes divide the batch, each takes a share, (B / shares, T).
        """
        ids = self.cut(self.starts(step, share, shares)).astype(np.int64)
        return ids[:, :-1], ids[:, 1:]

    def cut(self, starts: np.ndarray) -> np.ndarray:
        """The windows that begin at ``starts`` (…), with the token after each: (…, T + 1)."""
        return self.tokens[starts[..., None] + np.arange(self.seq_len + 1)]
