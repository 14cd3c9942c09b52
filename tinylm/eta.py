"""How long a run still takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_INTERRUPTED = 0.1  # of a session limited by time


class Eta:
    """Times steps and what interrupts them apart, since the mix of both changes during a run.

    The first step of a session is left out: it pays for memory, kernels and compilation once.
    Checkpoints are made by the clock, so they count as part of the steps they come between.

    Args:
        clock: seconds from any fixed moment.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._start = clock, clock()
        self._interrupted = 0.0  # seconds of all interruptions
        self._spent: dict[str, list[float]] = {}  # kind -> seconds of each interruption
        self._begin: tuple[float, float] | None = None  # share done and clock after the first step

    @contextmanager
    def interruption(self, kind: str) -> Iterator[None]:
        """Times the evaluation, or other work between steps, that it goes round."""
        start = self._clock()
        yield
        seconds = self._clock() - start
        self._interrupted += seconds
        self._spent.setdefault(kind, []).append(seconds)

    def has_room(self, *kinds: str) -> bool:
        """Whether another interruption, of a `cost`, leaves nine tenths of the time to steps."""
        session = self._clock() - self._start
        return self._interrupted + self.cost(*kinds) <= MOST_INTERRUPTED * session

    def steps(self, share: float) -> float | None:
        """Seconds for the steps from ``share`` (0 … 1) of the run to its end; call it after each.

        None while too little is known.
        """
        now = self._clock() - self._interrupted
        if self._begin is None:
            self._begin = share, now
        first, start = self._begin
        return None if share <= first else (now - start) / (share - first) * (1 - share)

    def cost(self, *kinds: str) -> float:
        """Mean seconds of an interruption of the first of ``kinds`` that was seen; else 0."""
        for kind in kinds:
            if spent := self._spent.get(kind):
                return sum(spent) / len(spent)
        return 0.0
