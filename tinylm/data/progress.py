"""What a long step shows on standard error: a bar on a terminal, else one line at its end."""

import sys
import time
from types import TracebackType
from typing import Any

from tinylm.data.sources import Source


class Stage:
    """One reading of a corpus. The bar follows the bytes read; the figures are of the text."""

    def __init__(self, title: str, sources: list[Source], show: bool = True) -> None:
        self._title = title
        self._sources = sources
        self._show = show
        self._documents = self._text_bytes = 0
        self._bar: Any = None

    def __enter__(self) -> "Stage":
        self._began = time.perf_counter()
        if self._show and sys.stderr.isatty():
            from tqdm import tqdm

            total = sum(source.total_bytes for source in self._sources)
            self._bar = tqdm(
                total=total, desc=self._title, unit="B", unit_scale=True, file=sys.stderr
            )
        return self

    def advance(self, documents: int, text_bytes: int) -> None:
        """Counts documents that were read, and their size in bytes of UTF-8."""
        self._documents += documents
        self._text_bytes += text_bytes
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._documents:,} documents", refresh=False)
            self._bar.update(sum(source.bytes_read for source in self._sources) - self._bar.n)

    def note(self, text: str) -> None:
        """Shows ``text`` beside the bar, if there is one."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._show and kind is None:
            seconds = time.perf_counter() - self._began
            megabytes = self._text_bytes / 1e6
            print(
                f"{self._title}: {self._documents:,} documents, {megabytes:,.1f} MB of text in"
                f" {seconds:.1f} s ({megabytes / max(seconds, 1e-9):,.1f} MB/s)",
                file=sys.stderr,
                flush=True,
            )
