"""Where the time of one training step goes on a CPU, as a table for docs/training.md.

    python bench/profile_step.py --preset modern --shape 16x256

Every moment of a step belongs to the stage that was entered last: hooks around the model's modules
enter and leave stages, forwards and backwards. The chunked cross-entropy computes its gradients
while it goes forwards, so most of its cost stands there. On a shared machine take one thread and
--cpu-time.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
from bench_train import Clock, Ours, make_config, words

from tinylm.device import freed_memory_kept
from tinylm.model import Attention, FeedForward, LayerNorm, RMSNorm

HEAD, REST = "head and cross-entropy", "residual sums, casts, the rest"
NAMES = {
    Attention: "attention: QK-norm, rotary, scores, softmax",
    FeedForward: "feed-forward layer",
    LayerNorm: "norms",
    RMSNorm: "norms",
    torch.nn.Embedding: "embedding",
}
PROJECTIONS, WHOLE = "attention: projections", "attention, with its norm and projections"
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


class Stages:
    """Seconds by stage and phase; time goes to the innermost stage that is open."""

    def __init__(self, now):
        self.now, self.phase, self.base, self.open = now, FORWARD, REST, []
        self.seconds = defaultdict(float)
        self.last = now()

    def charge(self):
        now = self.now()
        self.seconds[self.open[-1] if self.open else self.base, self.phase] += now - self.last
        self.last = now

    def enter(self, stage):
        self.charge()
        self.open.append(stage)

    def leave(self):
        self.charge()
        self.open.pop()

    def begin(self, phase, base):
        """From here on, what is in no stage belongs to ``base``."""
        self.charge()
        self.phase, self.base = phase, base

    def watch(self, module, stage):
        module.register_forward_pre_hook(lambda *_: self.enter(stage))
        module.register_forward_hook(lambda *_: self.leave())
        if not isinstance(module, torch.nn.Embedding):  # nothing flows back through its input
            module.register_full_backward_pre_hook(lambda *_: self._enter_back(stage))
            module.register_full_backward_hook(lambda *_: self.leave())

    def _enter_back(self, stage):
        if self.base == HEAD:  # the first module that is reached lies below the head
            self.begin(self.phase, REST)
        self.enter(stage)


def watch_model(model, stages):
    for name, module in model.named_modules():
        if isinstance(module, Attention) and not module.config.bias:
            stages.watch(module, WHOLE)  # which are operators, not modules
        elif name.endswith(("attention.qkv", "attention.out")):
            stages.watch(module, PROJECTIONS)
        elif type(module) in NAMES:
            stages.watch(module, NAMES[type(module)])
    hidden = model.hidden

    def below_the_head(ids_BT, **options):
        stages.begin(FORWARD, REST)
        h_BTC = hidden(ids_BT, **options)
        stages.begin(FORWARD, HEAD)
        return h_BTC

    model.hidden = below_the_head


def watched_step(trainer, number, stages):
    """The parts of `Trainer._train_step`, with a stage for each."""
    stages.last = stages.now()
    stages.begin(UPDATE, "drawing windows")
    x_BT, y_BT = map(torch.from_numpy, trainer.sampler.batch(number))
    stages.begin(FORWARD, REST)
    with trainer.device.autocast():
        loss = trainer.model.loss(x_BT, y_BT)
    stages.begin(BACKWARD, HEAD)
    loss.backward()
    stages.begin(UPDATE, "clipping")
    trainer.step._clip()
    for part in trainer.optimizer._parts:
        stages.begin(UPDATE, type(part).__name__)
        part.step()
    stages.begin(UPDATE, REST)
    trainer.optimizer.zero_grad()
    stages.charge()


def profile(trainer, now, steps):
    """Median seconds by (stage, phase) over ``steps`` steps."""
    collected = defaultdict(list)
    stages = Stages(now)
    watch_model(trainer.model, stages)
    for number in range(steps + 2):
        stages.seconds.clear()
        watched_step(trainer, number, stages)
        if number >= 2:  # after a warm-up
            for key, seconds in stages.seconds.items():
                collected[key].append(seconds)
    return {key: statistics.median(seconds) for key, seconds in collected.items()}


def table(seconds):
    total = sum(seconds.values())
    stages = sorted({stage for stage, _ in seconds}, key=lambda s: -_sum(seconds, s))
    lines = ["| stage | forward ms | backward ms | update ms | share |", "|---|--:|--:|--:|--:|"]
    for stage in stages:
        cells = [seconds.get((stage, phase)) for phase in (FORWARD, BACKWARD, UPDATE)]
        shown = ["–" if cell is None else f"{1000 * cell:.1f}" for cell in cells]
        lines.append(f"| {stage} | {' | '.join(shown)} | {_sum(seconds, stage) / total:.0%} |")
    lines.append(f"| whole step | | | {1000 * total:.1f} | 100% |")
    return "\n".join(lines)


def _sum(seconds, stage):
    return sum(value for (name, _), value in seconds.items() if name == stage)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="modern")
    parser.add_argument("--shape", default="16x256", help="batch x window")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--kernels", default="auto", help="as TINYLM_KERNELS")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine")
    arguments = parser.parse_args()
    batch_size, seq_len = map(int, arguments.shape.split("x"))
    config = make_config(arguments.preset, batch_size, seq_len, "cpu", arguments.precision)
    ours = Ours(config, words(), arguments.kernels)
    now = time.process_time if arguments.cpu_time else time.perf_counter
    with freed_memory_kept(ours.trainer.device):  # as in a run
        plain = [Clock("cpu", arguments.cpu_time).seconds(ours.step, 1) for _ in range(5)]
        seconds = profile(ours.trainer, now, arguments.steps)
    tokens = batch_size * seq_len
    print(
        f"`{arguments.preset}`, {batch_size} windows of {seq_len}, "
        f"{ours.trainer.device.precision}, {torch.get_num_threads()} threads: "
        f"{tokens / min(plain):,.0f} tokens/s without the hooks, "
        f"{tokens / sum(seconds.values()):,.0f} with them\n"
    )
    print(table(seconds))


if __name__ == "__main__":
    main()
