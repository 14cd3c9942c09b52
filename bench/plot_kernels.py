"""Draws what bench_kernels.py measured: ``plot_kernels.py kernels.json kernels.png``."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 4


def main(source: str, target: str) -> None:
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    info = {}
    for benchmark in json.loads(Path(source).read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        groups[benchmark["group"]][info["side"]] = info["milliseconds"]
    if not groups:
        sys.exit(f"{source} holds no benchmarks")
    sides = sorted({side for times in groups.values() for side in times})
    colours = dict(zip(sides, plt.colormaps["tab20"].colors, strict=False))
    rows = -(-len(groups) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 1.9 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (group, times) in zip(axes.flat, groups.items(), strict=False):
        ordered = sorted(times.items(), key=lambda item: -item[1])
        bars = axis.barh(
            [side for side, _ in ordered],
            [ms for _, ms in ordered],
            color=[colours[side] for side, _ in ordered],
        )
        axis.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
        axis.set_title(group, fontsize=7)
        axis.tick_params(labelsize=6)
        axis.margins(x=0.15)
    figure.suptitle(f"ms per call, less is better: {info['device']}, {info['dtype']}", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
