"""Kills a training run again and again, and compares what it becomes with one left in peace.

    python tests/kill_training.py --kills 50

Each run is killed (SIGKILL) at random moments, from the preparation of its data to its last
evaluation, and started again with the same configuration until it ends. Then last and best
weights, optimizer state, losses, samples and evaluation have to be those of the undisturbed run,
bit for bit, and no temporary file may be left. Needs `os.fork`.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process cannot use its parent's threads

from conftest import SMALL, make_documents, write_jsonl
from runs import assert_same_run

from tinylm.config import TrainConfig
from tinylm.run import train

OPTIONS = SMALL | {"steps": 80, "log_every": 1, "eval_every": 9}
EVERY_STEP = 1e-9  # seconds between checkpoints: many kills hit one that is being written
PRESETS: list[dict[str, Any]] = [
    {"preset": "modern", "checkpoint_seconds": EVERY_STEP},
    {"preset": "modern", "checkpoint_seconds": 0.1, "optimizer": "adamw", "micro_batch_size": 2},
    {"preset": "causal", "checkpoint_seconds": 0.05, "n_layers": None},
    {"preset": "notebook", "checkpoint_seconds": EVERY_STEP, "n_layers": None, "max_seq_len": None},
]


def start(config: TrainConfig, cache: Path) -> int:
    """Trains in a process of its own, which has its imports behind it; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ["TINYLM_CACHE"] = str(cache)
    code = 1
    try:
        train(config, quiet=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def finished(config: TrainConfig, cache: Path) -> float:
    """Trains undisturbed; returns the seconds it took."""
    began = time.monotonic()
    status = os.waitpid(start(config, cache), 0)[1]
    assert status == 0, f"ended with status {status}"
    return time.monotonic() - began


def phase(folder: Path) -> str:
    """What a run was doing when it was killed, by what it left."""
    for path in folder.rglob(".*.tmp"):
        return "writing " + re.sub(r"\d+", "N", path.name[1:].rsplit(".", 2)[0])
    if not (folder / "config.json").exists():
        return "preparing"
    if not list(folder.glob("checkpoints/step-*")):
        return "beginning"
    ended = (folder / "loss.png").exists()
    return "evaluating at the end" if ended else "starting again or training"


def records(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_and_kill(pid: int, folder: Path, longest: float, generator: random.Random) -> bool:
    """Kills the run after up to ``longest`` seconds: of its life, or of what it trains in it."""
    before = records(folder)
    if generator.random() < 0.7:
        while records(folder) <= before:
            if has_ended(pid):
                return False
            time.sleep(0.002)
    time.sleep(generator.uniform(0, longest))
    if has_ended(pid):
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def has_ended(pid: int) -> bool:
    ended, status = os.waitpid(pid, os.WNOHANG)
    assert status == 0, f"ended with status {status}"
    return ended == pid


def kill_until_finished(
    config: TrainConfig, cache: Path, longest: float, kills: int, generator: random.Random
) -> Counter[str]:
    """Trains with at most ``kills`` kills; returns what each hit."""
    folder, hits = Path(config.out), Counter[str]()
    while not (folder / "eval.json").exists():
        pid = start(config, cache)
        if hits.total() < kills:
            if wait_and_kill(pid, folder, longest, generator):
                hits[phase(folder)] += 1
            continue
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"ended with status {status}"
    left = [str(path) for path in folder.rglob(".*.tmp")]
    assert not left, left
    return hits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    parser.add_argument("--per-run", type=int, default=12, help="kills of one run (default 12)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, hits, runs = random.Random(arguments.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = write_jsonl(work / "corpus.jsonl", make_documents(200))
        peaceful: dict[int, float] = {}
        # Once here, so that those killed need not import anything.
        train(
            TrainConfig.from_preset(data=str(data), out=str(work / "first"), **SMALL, steps=2),
            quiet=True,
        )
        while hits.total() < arguments.kills:
            which = runs % len(PRESETS)
            options = OPTIONS | {"data": str(data)} | PRESETS[which]
            preset = options.pop("preset")
            whole = TrainConfig.from_preset(preset, out=str(work / f"whole{which}"), **options)
            if which not in peaceful:
                peaceful[which] = finished(whole, work / "cache")
            cut = TrainConfig.from_preset(preset, out=str(work / f"cut{runs}"), **options)
            most = min(arguments.per_run, arguments.kills - hits.total())
            longest = 2 * peaceful[which] / arguments.per_run
            new = kill_until_finished(cut, work / f"cache{runs}", longest, most, generator)
            assert_same_run(Path(whole.out), Path(cut.out))
            hits, runs = hits + new, runs + 1
            print(f"run {runs}, {preset}: {new.total()} kills, the same bits", flush=True)
    print(f"{hits.total()} kills of {runs} runs: {dict(hits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
