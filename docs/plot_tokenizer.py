"""Draws what the word tokenizer's benchmarks measured.

pytest bench/bench_tokenizer.py --benchmark-json=word.json
python docs/plot_tokenizer.py docs/tokenizer-word.png word.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = ["notebook", "split", "tokenizers", "tinylm from bytes", "tinylm"]
GREYS = {"notebook": "#bbbbbb", "split": "#888888", "tokenizers": "#d9a441"}

target, source = map(Path, sys.argv[1:])
results = json.loads(source.read_text(encoding="utf-8"))["benchmarks"]


def of_group(group):
    return [r["extra_info"] for r in results if r["group"] == group]


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

encode = of_group("word encode")
scripts = list(dict.fromkeys(r["script"] for r in encode))
bars = [(side, n) for side in SIDES for n in (1, 2)]
bars = [b for b in bars if any((r["side"], r["threads"]) == b for r in encode)]
for place, (side, threads) in enumerate(bars):
    speeds = {
        r["script"]: r["megabytes_per_second"]
        for r in encode
        if (r["side"], r["threads"]) == (side, threads)
    }
    color = GREYS.get(side, "#2b6cb0" if side == "tinylm" else "#63a4d8")
    left.bar(
        [scripts.index(s) + (place - len(bars) / 2 + 0.5) * 0.8 / len(bars) for s in speeds],
        list(speeds.values()),
        0.8 / len(bars),
        label=f"{side}, {threads} thread{'s' * (threads > 1)}",
        color=color,
        hatch="//" if threads > 1 else None,
        edgecolor="white",
    )
left.set_yscale("log")
left.set_xticks(range(len(scripts)), scripts)
left.set_ylabel("MB of UTF-8 per second")
left.set_title("Encoding")
left.set_ylim(top=2e4)  # room for the legend
left.legend(fontsize=7, ncols=2, loc="upper left")

for threads in (1, 2):
    for as_one in (False, True):
        line = [
            (r["size"], r["megabytes_per_second"])
            for r in of_group("word size")
            if (r["threads"], r["as_one"]) == (threads, as_one)
        ]
        right.plot(
            *zip(*sorted(line), strict=True),
            marker="o",
            linestyle="-" if as_one else "--",
            color="#2b6cb0" if threads == 1 else "#c05621",
            label=f"{'one text' if as_one else 'documents'}, {threads} thread{'s' * (threads > 1)}",
        )
right.set_xscale("log")
right.set_xlabel("MB in one call")
right.set_ylabel("MB per second")
right.set_ylim(bottom=0)
right.set_title("Encoding, by size")
right.legend(fontsize=7)
figure.savefig(target, dpi=120)
