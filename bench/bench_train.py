"""Training steps against a plain loop on the same model, and against what the machine can do.

    python bench/bench_train.py --out train.json

For each preset and each batch × window: tokens per second of the plain loop of `plain_model`, eager
and compiled, and of tinylm's own step, as the presets train (with their own optimizer), with plain
torch operators (TINYLM_KERNELS=torch), and on a GPU without its CUDA graph. First both sides have
to agree on loss and gradient for the same weights and batch. The sides take turns, so that a busy
moment of the machine meets all of them; the best turn counts. The last columns are the matrix
products of tinylm's whole step over its time, as a share of the fastest large matrix product
measured between the turns, and the share of the time in which a GPU is idle.

Freed memory is not kept here as in a run on a CPU (`tinylm.device.freed_memory_kept`): that would
last for the plain loop too, which in a process of its own has no such thing.

On a shared machine take one thread and --cpu-time.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_model import PlainLoop, PlainModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tinylm.config import TrainConfig
from tinylm.data.tokens import Dataset, TokenFile
from tinylm.device import choose_device
from tinylm.kernels import dispatch, prepare
from tinylm.model import Transformer
from tinylm.progress import TrainingProgress
from tinylm.trainer import Trainer

VOCAB_SIZE = 10_000
SHAPES = {"cpu": "16x32,64x256", "cuda": "16x32,64x256,512x32,2048x32"}


def make_config(preset, batch_size, seq_len, device, precision):
    options = {"batch_size": batch_size, "seq_len": seq_len, "steps": 10**6}
    options["embedding_init"] = "random"  # the other looks at the text, which is made up here
    config = TrainConfig.from_preset(preset, device=device, precision=precision, **options)
    return replace(config, model=replace(config.model, vocab_size=VOCAB_SIZE))


def words(count=2_000_000):
    """Tokens as frequent as words are (Zipf's law), so that embeddings are read as in text."""
    ranks = np.random.default_rng(0).zipf(1.2, count)
    return ((ranks - 1) % VOCAB_SIZE).astype(np.uint16)


# --- both sides ----------------------------------------------------------------------------------


def compare(config, dtype=torch.float32):
    """Largest relative differences of loss and of any gradient between the two sides."""
    ours = Transformer(config.model, seed=1).to(config.device)
    with torch.no_grad():  # away from the zeros that blocks start with, which would hide them
        generator = torch.Generator().manual_seed(0)
        for p in ours.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator).to(p.device)
    plain = PlainModel(config.model).to(config.device)
    plain.load_state_dict(ours.state_dict())
    ids = torch.from_numpy(words(config.batch_size * config.seq_len + 1).astype(np.int64))
    x, y = (t.view(config.batch_size, -1).to(config.device) for t in (ids[:-1], ids[1:]))
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        losses = ours.loss(x, y), plain(x, y)
    for loss in losses:
        loss.backward()
    gradients = zip(ours.parameters(), plain.parameters(), strict=True)
    worst = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in gradients)
    ours_loss, plain_loss = (loss.item() for loss in losses)
    return abs(ours_loss - plain_loss) / plain_loss, worst


@pytest.mark.parametrize("preset", ["causal", "modern"])
def test_both_sides_compute_the_same(preset):
    loss, gradient = compare(make_config(preset, 4, 24, "cpu", "fp32"))
    assert loss < 1e-5
    assert gradient < 1e-3


class Ours:
    """tinylm's own training step, without what happens between steps."""

    def __init__(self, config, tokens, kernels):
        self.kernels = kernels
        self.select()
        device = choose_device(config.device, config.precision)
        folder = Path(tempfile.mkdtemp())
        split = TokenFile(tokens, np.array([0, len(tokens)]))
        tokenizer = SimpleNamespace(kind="word")  # all that a trainer asks of it
        dataset = Dataset(folder, {}, tokenizer, {"train": split, "valid": split})
        self.trainer = Trainer(config, dataset, folder, device, TrainingProgress(quiet=True))

    def select(self):
        os.environ[dispatch.ENVIRONMENT_VARIABLE] = self.kernels
        dispatch.forget()

    def step(self):
        self.trainer._train_step(0.5)


def sides(config, tokens, compiled):
    """Name -> what steps; the plain loop in fp32 too, where that is not what tinylm runs in."""
    device = choose_device(config.device, config.precision)
    out = {"tinylm": Ours(config, tokens, "auto"), "tinylm, torch": Ours(config, tokens, "torch")}
    if device.type == "cuda":
        out["tinylm, eager"] = Ours(replace(config, cuda_graph=False), tokens, "auto")
    dtypes = dict.fromkeys([torch.float32, device.dtype])
    for dtype in dtypes:
        for how in ["eager", "compiled"][: 1 + (compiled and dtype == device.dtype)]:
            name = f"plain {how}" + (" fp32" if dtype != device.dtype else "")
            model = PlainModel(config.model).to(device.torch_device)
            model.load_state_dict(Transformer(config.model).state_dict())
            shape = config.batch_size, config.seq_len
            out[name] = PlainLoop(model, tokens, *shape, dtype, how == "compiled")
    return out


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds of a call: of the wall, or of this process's threads on a busy CPU."""

    device: str
    cpu_time: bool = False

    def seconds(self, call, count):
        now = time.process_time if self.cpu_time else time.perf_counter
        self.wait()
        start = now()
        for _ in range(count):
            call()
        self.wait()
        return (now() - start) / count

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def matmul_rate(clock, dtype, size):
    """FLOP/s of one large square product, the best of five."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = min(clock.seconds(lambda: torch.mm(a, b, out=out), 1) for _ in range(5))
    return 2 * size**3 / seconds


def idle_share(step, count=30):
    """Share of the time from the first kernel to the last in which none runs, as CUPTI sees it."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return idle(spans)


def idle(spans):
    """Share of the time from the first start to the last end that none of ``spans`` covers."""
    spans = sorted(spans)
    first = end = spans[0][0]
    gaps = 0.0
    for start, stop in spans:
        gaps += max(0.0, start - end)
        end = max(end, stop)
    return gaps / (end - first)


def test_idle_time_is_what_no_kernel_covers():
    assert idle([(0, 4), (3, 5), (1, 2)]) == 0
    assert idle([(8, 10), (0, 4), (2, 3), (4, 6)]) == pytest.approx(0.2)


def matmul_flops(config):
    """Of one step's matrix products, forward and backward: 6 for each weight and token, and 12 T C
    a token and block for attention's scores and sums (all of them, masked or not)."""
    model = Transformer(config.model)
    weights = sum(model.get_parameter(name).numel() for name in model.matrices())
    weights += model.head_weight_VC.numel()
    attention = 12 * config.seq_len * config.model.d_model * config.model.n_layers
    return (6 * weights + attention) * config.batch_size * config.seq_len


def measure(config, arguments, clock):
    """Tokens per second of each side, and the peaks measured between them."""
    tokens = words()
    running = sides(config, tokens, not arguments.no_compile)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if clock.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        dtypes["fp16"] = torch.float16  # there, bf16 is emulated
        del dtypes["bf16"]
    best, peaks = dict.fromkeys(running, float("inf")), dict.fromkeys(dtypes, 0.0)
    size = 8192 if clock.device == "cuda" else 2048
    for round_ in range(arguments.rounds + 1):
        for name, side in running.items():
            if isinstance(side, Ours):
                side.select()
            once = clock.seconds(side.step, 3 if round_ == 0 else 1)  # round 0 warms up
            if round_:
                count = max(1, int(arguments.seconds / once))
                best[name] = min(best[name], clock.seconds(side.step, count))
        for name, dtype in dtypes.items():
            peaks[name] = max(peaks[name], matmul_rate(clock, dtype, size))
    per_step = config.batch_size * config.seq_len
    rate = matmul_flops(config) / best["tinylm"]
    idle = None
    if clock.device == "cuda":
        running["tinylm"].select()
        idle = idle_share(running["tinylm"].step)
    return {
        "idle_share": idle,
        "tokens_per_second": {name: per_step / seconds for name, seconds in best.items()},
        "peak_tflops": {name: peak / 1e12 for name, peak in peaks.items()},
        "share_of_peak": {name: rate / peak for name, peak in peaks.items()},
    }


# --- the command ---------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--presets", default="causal,modern")
    parser.add_argument("--shapes", help="batch x window, such as 16x32,64x256")
    parser.add_argument("--rounds", type=int, default=5, help="turns each side takes")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine")
    parser.add_argument("--out", help="JSON file for the results")
    return parser.parse_args()


def processor():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n") if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def row(result):
    rates = result["tokens_per_second"]
    cells = [f"`{result['preset']}` {result['shape']}"]
    cells += [f"{rates[name] / 1000:.1f}k" if name in rates else "–" for name in COLUMNS]
    eager = max(rate for name, rate in rates.items() if name.startswith("plain eager"))
    compiled = rates.get("plain compiled")
    cells.append(f"{rates['tinylm'] / eager:.2f}×")
    cells.append(f"{rates['tinylm'] / compiled:.2f}×" if compiled else "–")
    cells += [f"{share:.0%} ({name})" for name, share in result["share_of_peak"].items()]
    return [*cells, "–" if result["idle_share"] is None else f"{result['idle_share']:.1%}"]


COLUMNS = (
    "plain eager fp32", "plain eager", "plain compiled", "tinylm, eager", "tinylm, torch", "tinylm",
)  # fmt: skip
HEADS = ["tokens/s", *COLUMNS, "over eager", "over compiled", *["of peak"] * 2, "idle"]


def main():
    arguments = parse()
    device = choose_device(arguments.device, arguments.precision)
    prepare(device.torch_device)
    clock = Clock(device.type, arguments.cpu_time)
    about = {
        "device": str(device),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": "CPU time" if arguments.cpu_time else "wall",
    }
    print(" | ".join(f"{name}: {value}" for name, value in about.items()))
    results = []
    print("| " + " | ".join(HEADS) + " |", "|---|" + "--:|" * (len(HEADS) - 1), sep="\n")
    for preset in arguments.presets.split(","):
        for shape in (arguments.shapes or SHAPES[device.type]).split(","):
            sizes = tuple(map(int, shape.split("x")))
            config = make_config(preset, *sizes, arguments.device, arguments.precision)
            small = replace(config, batch_size=min(4, config.batch_size))
            for dtype, limits in ((torch.float32, (1e-4, 1e-2)), (device.dtype, (2e-2, 0.2))):
                differences = compare(small, dtype)
                if any(d > limit for d, limit in zip(differences, limits, strict=True)):
                    raise SystemExit(f"{preset} {shape} {dtype}: the sides differ by {differences}")
            result = {"preset": preset, "shape": shape} | measure(config, arguments, clock)
            results.append(result)
            print("| " + " | ".join(row(result)) + " |", flush=True)
    record = {"about": about, "config": asdict(config), "results": results}
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({"benchmark": "train", **about, "results": results}))


if __name__ == "__main__":
    main()
