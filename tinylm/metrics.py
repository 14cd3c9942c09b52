"""A run's record: one JSON object a line, written as it happens, and what is drawn from it."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinylm.files import atomic_write, disk_errors

Record = dict[str, Any]
FEW_POINTS = 20


class MetricsFile:
    """``metrics.jsonl``: can be read while training; a resumed run continues it seamlessly.

    Each record is in the file as soon as it is appended, by one write. A system may still show a
    reader the first part of a long line a moment earlier: a line is whole once it has its end.

    Attributes:
        follow: also told of each record, see `tinylm.loggers`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.follow: Callable[[Record], None] = lambda record: None

    def append(self, record: Record) -> None:
        rest = _line(record)
        with disk_errors(self.path), open(self.path, "ab", buffering=0) as file:
            while rest:  # once, but for a disk that is filling up
                rest = rest[file.write(rest) :]
        self.follow(record)

    def records(self) -> Iterator[Record]:
        """All whole records; a line cut short by a kill, or damaged, is left out."""
        if not self.path.exists():
            return
        # As bytes: text that grows while it is read would be decoded in the middle of a character.
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # being written: the file would go on in its middle
                    return
                with suppress(ValueError):  # never written to its end
                    record = json.loads(line.decode("utf-8", "replace"))
                    if isinstance(record, dict) and isinstance(record.get("step"), int):
                        yield record

    def drop_after(self, step: int) -> None:
        """Forgets what came after ``step``: a run resumed there will say it again."""
        kept = [record for record in self.records() if record["step"] <= step]
        with atomic_write(self.path) as file:
            for record in kept:
                file.write(_line(record))


def _line(record: Record) -> bytes:
    """JSON knows neither infinity nor NaN, which the gradient of a skipped step may be: null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return (json.dumps(finite, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def write_samples(metrics: MetricsFile, path: str | os.PathLike[str]) -> None:
    """``samples.txt``: every text sampled during the run, under the step it comes from."""
    with atomic_write(path) as file:
        for record in metrics.records():
            if "samples" in record:
                file.write(f"=== step {record['step']:,} ===\n\n".encode())
                for sample in record["samples"]:
                    file.write((sample.strip() + "\n\n").encode("utf-8", "replace"))


def plot_loss(metrics: MetricsFile, path: str | os.PathLike[str], title: str) -> None:
    """``loss.png``: training and validation loss against tokens seen."""
    records = list(metrics.records())
    train = _points(records, "tokens", "loss")
    figure, axes = _axes("training tokens", "loss (nats per token)", title)
    shown = list(train)
    if train:
        axes.plot(*zip(*train, strict=True), color="0.8", linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color="C0", label="training (smoothed)")
    for key, label, color in (
        ("valid_loss", "validation", "C1"),
        ("valid_leaked_loss", "validation, leaked (the input holds the target)", "C3"),
    ):
        points = _points(records, "tokens", key)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=color, label=label)
            shown += points
            axes.annotate(
                f"{points[-1][1]:.3f}",
                points[-1],
                textcoords="offset points",
                xytext=(0, 8),
                horizontalalignment="right",
            )
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    _leave_out_the_fall(axes, shown)
    if shown:
        axes.legend()
    _save(figure, path)


def plot_runs(
    runs: Mapping[str, MetricsFile],
    path: str | os.PathLike[str],
    title: str,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Validation losses of several runs, by label, against the minutes they took.

    Of a model without causal mask both curves are drawn, the honest and the leaked. ``levels``
    are losses to compare with, drawn as lines across.
    """
    figure, axes = _axes("minutes of training", "validation loss (nats per token)", title)
    shown: list[tuple[float, float]] = []
    for i, (label, metrics) in enumerate(runs.items()):
        records = list(metrics.records())
        for key, style, suffix in (
            ("valid_loss", "o-", ""),
            ("valid_leaked_loss", "o--", ", leaked"),
        ):
            points = [(seconds / 60, loss) for seconds, loss in _points(records, "elapsed", key)]
            if points:
                text = f"{label}{suffix}: {points[-1][1]:.2f}"
                axes.plot(
                    *zip(*points, strict=True), style, markersize=3, color=f"C{i}", label=text
                )
                shown += points
    end = max((x for x, _ in shown), default=0.0)
    for i, (label, loss) in enumerate((levels or {}).items()):
        text, grey = f"{label}: {loss:.2f}", str(0.7 - 0.2 * min(i, 3))
        axes.axhline(loss, linestyle=":", color=grey, label=text)
        shown.append((end, loss))
    _leave_out_the_fall(axes, shown)
    figure.legend(loc="outside lower center", ncols=3)  # so many curves leave no room inside
    _save(figure, path)


def _points(records: list[Record], x: str, y: str) -> list[tuple[float, float]]:
    """Of the records that have both; a skipped step's loss may be null."""
    points = [(record.get(x), record.get(y)) for record in records]
    return [(a, b) for a, b in points if a is not None and b is not None]


def _leave_out_the_fall(axes: Any, points: list[tuple[float, float]]) -> None:
    """Cuts the axis above all but the first fiftieth, whose steep fall would hide the rest.

    Where there is no rest to speak of, everything is shown.
    """
    end = max((x for x, _ in points), default=0.0)
    later = [y for x, y in points if x > end / 50]
    if len(later) >= FEW_POINTS:
        low, high = min(later), max(later)
        axes.set_ylim(low - 0.1 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a centred window of about a twenty-fifth of the run."""
    reach = len(points) // 50
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - reach) : i + reach + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
