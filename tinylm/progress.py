"""What a person sees while waiting: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


def duration(seconds: float) -> str:
    """``45 s``, ``3:20`` or ``1:02:03``."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """A bar from 0 to 100 % with figures beside it; without a terminal, a line now and then."""

    LINE_SECONDS = 15.0

    def __init__(self, quiet: bool = False) -> None:
        self._terminal = sys.stderr.isatty() and not quiet
        self.quiet = quiet
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=1.0,
            disable=not self._terminal,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {desc}",
            leave=False,
        )

    def update(self, share: float, figures: Mapping[str, str]) -> None:
        """Shows that ``share`` (0 … 1) of the run is done."""
        text = "  ".join(f"{name} {value}" if name else value for name, value in figures.items())
        if self._terminal:
            self._bar.n = min(share, 1.0)
            self._bar.set_description_str(text)
        elif not self.quiet and time.monotonic() - self._last_line > self.LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{share:4.0%}  {text}")

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()
