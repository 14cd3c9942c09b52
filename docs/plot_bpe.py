"""Draws what the benchmarks of byte-level BPE measured.

pytest bench/bench_bpe.py --benchmark-json=bpe2.json
taskset -c 0 pytest bench/bench_bpe.py --benchmark-json=bpe1.json
python docs/plot_bpe.py docs/tokenizer-bpe.png bpe1.json bpe2.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"tinylm": "#2b6cb0", "gigatoken": "#c05621"}
GREY = "#999999"

target, *sources = map(Path, sys.argv[1:])
results = [
    r for file in sources for r in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
]


def of_group(group, **wanted):
    found = [r["extra_info"] for r in results if r["group"] == f"bpe {group}" and r["extra_info"]]
    return [info for info in found if all(info[k] == v for k, v in wanted.items())]


def speeds(axes, groups):
    """Horizontal bars, fastest on top: cold and warm, by side."""
    infos = of_group(groups, threads=1)
    cold = {i["side"]: i["megabytes_per_second"] for i in infos if not i["warm"]}
    warm = {i["side"]: i["megabytes_per_second"] for i in infos if i["warm"]}
    sides = sorted(cold, key=cold.__getitem__)
    colors = [COLORS.get(side.split()[0], GREY) for side in sides]
    places = range(len(sides))
    axes.barh([p + 0.2 for p in places], [cold[s] for s in sides], 0.4, color=colors, label="cold")
    axes.barh(
        [p - 0.2 for p in places], [warm[s] for s in sides], 0.4, color=colors, alpha=0.4,
        label="warm",
    )  # fmt: skip
    for p, side in enumerate(sides):
        axes.text(cold[side], p + 0.2, f" {cold[side]:,.3g}", va="center", fontsize=7)
        axes.text(warm[side], p - 0.2, f" {warm[side]:,.3g}", va="center", fontsize=7)
    axes.set_yticks(list(places), sides)
    axes.set_xlabel("MB per second")
    axes.set_xlim(right=1.15 * max(warm.values()))
    axes.set_title("10,000 tokens, one thread: cold (dark), warm (light)", fontsize=10)


def curves(axes, group, key, title, **wanted):
    for side, color in COLORS.items():
        for threads, style in ((1, "-"), (2, "--")):
            line = sorted(
                (i[key], i["megabytes_per_second"])
                for i in of_group(group, side=side, threads=threads, **wanted)
            )
            if line:
                label = f"{side}, {threads} thread{'s' * (threads > 1)}"
                axes.plot(
                    *zip(*line, strict=True), style, marker="o", ms=3, color=color, label=label
                )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MB per second, cold")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)


def scripts(axes):
    infos = of_group("script", threads=1)
    names = list(dict.fromkeys(i["script"] for i in infos))
    for place, (side, color) in enumerate(COLORS.items()):
        found = {i["script"]: i["megabytes_per_second"] for i in infos if i["side"] == side}
        axes.bar(
            [names.index(n) + (place - 0.5) * 0.4 for n in found], list(found.values()), 0.4,
            color=color, label=side,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("MB per second, cold")
    axes.set_title("By script, one thread", fontsize=10)
    axes.legend(fontsize=7)


figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
speeds(axes[0, 0], "encode")
curves(axes[0, 1], "size", "size", "By MB of text in one call, documents", as_one=False)
curves(axes[0, 2], "size", "size", "By MB of text in one call, one text", as_one=True)
curves(axes[1, 0], "vocabulary", "size", "By tokens in the vocabulary")
curves(axes[1, 1], "document length", "characters", "By characters in a document (10 MB)")
scripts(axes[1, 2])
figure.savefig(target, dpi=110)
