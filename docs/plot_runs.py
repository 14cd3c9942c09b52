"""Draws the validation losses of several runs in one plot.

python docs/plot_runs.py docs/presets.png runs/modern runs/causal runs/notebook
"""

import sys
from pathlib import Path

from tinylm.lm import load_config
from tinylm.metrics import MetricsFile, plot_runs

target, *folders = map(Path, sys.argv[1:])
runs = {load_config(folder).preset: MetricsFile(folder / "metrics.jsonl") for folder in folders}
plot_runs(runs, target, "The three presets: equal time, equal text, the same 10,000 words")
