"""Two processes train one model: as torchrun starts them, on a CPU, over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same_run, records
from torch.distributed import TCPStore

from tinylm import distributed
from tinylm.checkpoint import CheckpointFolder
from tinylm.config import TrainConfig
from tinylm.data.windows import WindowSampler
from tinylm.distributed import World
from tinylm.errors import InputError
from tinylm.run import train

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes as Linux shows them")


@given(step=st.integers(0, 50), share=st.integers(1, 5), shares=st.integers(1, 5))
def test_shares_of_a_batch_do_not_overlap(step: int, share: int, shares: int) -> None:
    sampler = WindowSampler(np.arange(3000, dtype=np.uint16), 16, batch_size=share * shares)
    parts = [sampler.batch(step, rank, shares) for rank in range(shares)]
    inputs, targets = (np.concatenate(p) for p in zip(*parts, strict=True))
    assert np.array_equal(inputs, sampler.batch(step)[0])
    assert np.array_equal(targets, sampler.batch(step)[1])


def test_one_process_is_a_world_of_its_own() -> None:
    world = World()
    assert world.is_main
    assert world.agree(3.0, signal.SIGTERM) == (3.0, signal.SIGTERM)
    assert world.mean(2.0) == 2.0
    assert world.main_first(lambda: 5) == 5
    assert world.device_name("auto") == "auto"


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    world = World(rank=5, size=8, local_rank=1)
    assert [world.device_name(d) for d in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(InputError, match="cannot serve 8 processes; ask for --device cuda"):
        world.device_name("cuda:0")


EXCHANGE = """
import signal, sys
from tinylm.distributed import joined
from tinylm.errors import InputError
with joined() as world:
    assert world.size == 2
    assert world.mean(float(world.rank)) == 0.5
    assert world.agree(7.5 + world.rank, None) == (7.5, None)
    assert world.agree(1.0, signal.SIGINT if world.rank else None) == (1.0, signal.SIGINT)
    world.require_same("height", 7)
    try:
        world.require_same("age", world.rank)
    except InputError as error:
        assert "as age, others do not" in str(error)
    order = world.main_first(lambda: world.rank)
    assert order == world.rank
    print("exchanged", flush=True)
    world.main_first(lambda: 1 / 0)
"""


def test_what_processes_tell_each_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE], env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (out0, err0), (out1, err1) = (p.communicate(timeout=120) for p in processes)
    assert (out0, out1) == ("exchanged\n", "exchanged\n"), err0 + err1
    assert [p.returncode for p in processes] == [1, 1], err0 + err1
    assert "ZeroDivisionError" in err0
    assert "Traceback" not in err1  # rank 0 has said it


def test_each_start_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts its processes again beside the store that the dead ones wrote into."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "RANK": "0", "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        store = distributed._store()
        assert not store.check(["address"])
        store.set("address", "of a process that will die")
        assert distributed._store().check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert not distributed._store().check(["address"])
    kept.set("address", "of a process of either machine")
    assert distributed._store().check(["address"])


def torchrun(options: dict[str, Any]) -> "subprocess.Popen[str]":
    """The README's command."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "tinylm", "train", *given],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def process_of(rank: int, parent: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{parent}\n" in (path / "status").read_text()
            if is_child and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue  # it has ended
    raise AssertionError(f"no process of rank {rank}")


@linux
def test_two_processes_are_as_good_as_one_whatever_happens(corpus: Path, tmp_path: Path) -> None:
    """One is killed, torchrun is stopped, and still the run is that of one process, bit for bit.

    For that one has to add up the halves of a batch as two do; with whole batches it is the same
    up to rounding.
    """
    cut, whole, plain = (tmp_path / name for name in ("cut", "whole", "plain"))
    options = SMALL | {"data": str(corpus), "steps": 80, "log_every": 1, "eval_every": 40}

    run = torchrun(options | {"out": str(cut)})
    while len(records(cut, "loss")) < 5:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    os.kill(process_of(1, run.pid), signal.SIGKILL)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 1, said
    saved = CheckpointFolder(cut / "checkpoints").steps()
    assert len(saved) == 1  # the survivor's
    message = "tinylm: rank 0: another process of this run has ended at step"
    assert f"{message} {saved[0] + 1}; the last good checkpoint is of step {saved[0]}" in said

    run = torchrun(options | {"out": str(cut)})
    while records(cut, "loss")[-1]["step"] < saved[0] + 5:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    assert run.returncode != 0
    assert said.count(f"resuming from the checkpoint of step {saved[0]}") == 1
    stopped = CheckpointFolder(cut / "checkpoints").steps()[-1]
    assert saved[0] + 5 <= stopped == records(cut, "loss")[-1]["step"] < 80
    assert f"stopped by SIGTERM at step {stopped}" in said

    run = torchrun(options | {"out": str(cut)})
    out, said = run.communicate(timeout=120)
    assert (run.returncode, out) == (0, f"{cut}\n"), said
    assert said.count(f"resuming from the checkpoint of step {stopped}") == 1
    assert said.count("evaluating on the whole validation split") == 1

    train(TrainConfig.from_preset(out=str(whole), micro_batch_size=4, **options), quiet=True)
    assert_same_run(whole, cut)
    train(TrainConfig.from_preset(out=str(plain), **options), quiet=True)
    curves = ([r["loss"] for r in records(folder, "loss")] for folder in (plain, cut))
    assert next(curves) == pytest.approx(next(curves), rel=1e-4)
    assert json.loads((plain / "eval.json").read_text())["loss"] == pytest.approx(
        json.loads((cut / "eval.json").read_text())["loss"], rel=1e-3
    )


def test_a_process_left_alone_has_recorded_its_last_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may end when the step is done, and only its clock is still to be agreed on."""
    agreed = []

    def agree(self: World, elapsed: float, stop: int | None) -> tuple[float, int | None]:
        agreed.append(elapsed)
        if len(agreed) == 6:
            raise distributed.PeerError("rank 0: another process of this run has ended")
        return elapsed, stop

    monkeypatch.setattr(World, "agree", agree)
    options = SMALL | {"data": str(corpus), "steps": 20, "log_every": 1}
    with pytest.raises(distributed.PeerError, match="the last good checkpoint is of step 6"):
        train(TrainConfig.from_preset(out=str(tmp_path / "run"), **options), quiet=True)
    assert [r["step"] for r in records(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").steps() == [6]
