"""SIGINT and SIGTERM as requests that a loop answers when it is ready to."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tinylm.distributed import PeerError


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; everything has been saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step:,}")
        self.signum, self.step = signum, step


class StopRequest:
    """``signum`` is that of the signal that came, None as long as none did."""

    signum: int | None = None


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within it, the first SIGINT or SIGTERM is only noted; a second one is obeyed at once."""
    request = StopRequest()

    def ask(signum: int, frame: object) -> None:
        request.signum = signum
        signal.signal(signum, old[signum])
        say("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old: dict[int, Any] = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except PeerError:
        # torchrun sends SIGTERM to those that are left; they end anyway, and say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        del old[signal.SIGTERM]
        raise
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
