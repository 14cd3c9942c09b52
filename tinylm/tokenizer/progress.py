"""Telling how far a long call has come."""

import time
from collections.abc import Callable

Progress = Callable[[str, int, int | None], object]
"""Called with the stage, how much of it is done, and how much there is (None: not known)."""

SECONDS_BETWEEN_CALLS = 0.1


class Teller:
    """Passes on what is known of one stage, not too often but in any case the last of it."""

    def __init__(self, progress: Progress | None, stage: str) -> None:
        self._progress, self._stage = progress, stage
        self._told = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self._told >= SECONDS_BETWEEN_CALLS:
            self.last(done, total)

    def last(self, done: int, total: int | None) -> None:
        """Passes it on in any case."""
        if self._progress is not None:
            self._progress(self._stage, done, total)
        self._told = time.monotonic()
