"""Batches made by the device that trains on them, the very windows of a `WindowSampler`.

Nothing here waits for the device, nor lets it wait: what the coming steps need is put where it
looks for it while it is busy with the steps before.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from tinylm.data.windows import WindowSampler

HALF_STEPS = 512  # rows in half a table
HALF_BYTES = 8 << 20  # or as many as this holds
UPLOAD_TOKENS = 16 << 20  # at once
RESIDENT_SHARE = 0.25  # of the free memory of a GPU, that a corpus may take

Rows = Callable[[int, int], np.ndarray]


class StepTable:
    """A row of numbers for each coming step, on a device, filled ahead of it.

    While the device works through one half of the table, a thread makes the rows of the other and
    a side stream copies them over from pinned memory. Events keep the order, on the device. The
    caller waits only if making rows takes longer than the steps do.

    Args:
        rows: makes the rows of (first step, number of steps): (steps, …), in a thread.
        shape: of one row.
        dtype: of the rows.
    """

    def __init__(
        self, rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, where: torch.device
    ) -> None:
        self._rows = rows
        row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._half = max(1, min(HALF_STEPS, HALF_BYTES // row_bytes))
        self._table = torch.zeros((2 * self._half, *shape), dtype=dtype, device=where)
        self._made = torch.empty(
            (2, self._half, *shape), dtype=dtype, pin_memory=where.type == "cuda"
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self._block = -1  # half tables come in blocks, numbered from step 0 on; the one in use
        self._coming: Future[None] | None = None
        self._side: torch.cuda.Stream | None = None
        if where.type == "cuda":
            self._side = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
            # A half has arrived; the device is done with the half it left.
            self._copied = [_event(), _event()]
            self._left = _event()
            self._table.record_stream(self._side)

    def prepare(self, step: int) -> None:
        """Sees to it that the row of ``step`` is there when the device comes to it.

        To be called before each step is issued, on the stream that it is issued on. A jump to
        another place than the step after the last is fine, and costs a wait.
        """
        block = step // self._half
        if block == self._block:
            return
        if self._coming is None or block != self._block + 1:
            self.settle()
            self._begin(block)
        assert self._coming is not None
        self._coming.result()
        if self._side is not None:
            torch.cuda.current_stream().wait_event(self._copied[block % 2])
        self._block = block
        self._begin(block + 1)

    def _begin(self, block: int) -> None:
        # All steps that read this half before have been issued by now.
        if self._side is not None:
            self._left.record()
        self._coming = self._thread.submit(self._fill, block)

    def _fill(self, block: int) -> None:
        made = self._made[block % 2]
        place = slice(block % 2 * self._half, (block % 2 + 1) * self._half)
        if self._side is not None:
            self._copied[block % 2].synchronize()  # the last copy from here; blocks this thread
        made.numpy()[...] = self._rows(block * self._half, self._half)
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            if self._side is not None:
                self._side.wait_event(self._left)
            self._table[place].copy_(made, non_blocking=True)
            if self._side is not None:
                self._copied[block % 2].record(self._side)

    def row(self, step: Tensor) -> Tensor:
        """The row of the step whose number from 0 ``step`` (int64, no dimension) holds."""
        return self._table.index_select(0, (step % len(self._table)).view(1)).squeeze(0)

    def settle(self) -> None:
        """Waits until nothing is on its way, as a graph's capture needs it."""
        if self._coming is not None:
            wait([self._coming])


class DeviceWindows:
    """Batches of a `WindowSampler`, by a step's number that only the device knows.

    With the corpus on the device, windows are cut there, and only where they start is sent.
    Otherwise their tokens are, read from the memory-mapped file while other steps run.
    """

    def __init__(self, sampler: WindowSampler, where: torch.device, resident: bool) -> None:
        self._shape = sampler.batch_size, sampler.seq_len
        # torch does little with unsigned integers; read as signed and widened, a mask mends them.
        dtype = {2: torch.int16, 4: torch.int32}[sampler.tokens.itemsize]
        signed = np.dtype(f"i{dtype.itemsize}")
        self._mask = (1 << 8 * dtype.itemsize) - 1
        self._window = torch.arange(sampler.seq_len + 1, device=where)
        self._corpus: Tensor | None = None
        if resident:
            self._corpus = _uploaded(sampler.tokens, signed, dtype, where)
            shape: tuple[int, ...] = (sampler.batch_size,)
            self._table = StepTable(sampler.starts_of_steps, shape, torch.int64, where)
            return

        def tokens(step: int, count: int) -> np.ndarray:
            return sampler.cut(sampler.starts_of_steps(step, count)).view(signed)

        shape = sampler.batch_size, sampler.seq_len + 1
        self._table = StepTable(tokens, shape, dtype, where)

    def prepare(self, step: int) -> None:
        """See `StepTable.prepare`."""
        self._table.prepare(step)

    def settle(self) -> None:
        """See `StepTable.settle`."""
        self._table.settle()

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and their next tokens, both int64 (B, T), by operations of the device alone."""
        row = self._table.row(step)
        if self._corpus is not None:
            row = self._corpus.take(row[:, None] + self._window)
        ids = row.long() & self._mask
        return ids[:, :-1], ids[:, 1:]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def fits(n_bytes: int, where: torch.device) -> bool:
    """Whether a corpus of ``n_bytes`` should live in the memory of a GPU."""
    free, _ = torch.cuda.mem_get_info(where)
    return n_bytes <= RESIDENT_SHARE * free


def _uploaded(
    tokens: np.ndarray, signed: np.dtype, dtype: torch.dtype, where: torch.device
) -> Tensor:
    corpus = torch.empty(len(tokens), dtype=dtype, device=where)
    for start in range(0, len(tokens), UPLOAD_TOKENS):
        part = np.array(tokens[start : start + UPLOAD_TOKENS])  # a memory map is read-only
        corpus[start : start + len(part)] = torch.from_numpy(part.view(signed)).to(where)
    return corpus
