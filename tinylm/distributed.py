"""One run in several processes, as `torchrun` starts them: each computes its share of every batch.

All hold the same weights and make the same update, from gradients that torch's
DistributedDataParallel averages. Only rank 0 prepares data, evaluates and writes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from tinylm.errors import InputError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from tinylm.model import Transformer

T = TypeVar("T")

# How long one process waits for the others: as long as rank 0 may take to prepare a large corpus.
# One that died is noticed at once by gloo, and by torchrun, which ends the rest.
PATIENCE = timedelta(days=1)


class PeerError(TrainingError):
    """Another process of this run has ended."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device_name(self, asked: str) -> str:
        """The device of this process: each of several has a GPU of its own, by local rank.

        Raises:
            InputError: one GPU is asked for by number, for several processes.
        """
        import torch

        if self.size == 1 or not torch.cuda.is_available():
            return asked
        if asked.startswith("cuda:"):
            raise InputError(
                f"device {asked!r} cannot serve {self.size} processes; ask for --device cuda"
            )
        return f"cuda:{self.local_rank}" if asked in ("auto", "cuda") else asked

    def main_first(self, work: Callable[[], T]) -> T:
        """``work()`` in every process, but in the others only once rank 0 has done it.

        If it fails there, rank 0 tells why, and the others end without a word.
        """
        if self.size == 1:
            return work()
        if not self.is_main:
            if self._broadcast(0):
                raise SystemExit(1)
            return work()
        try:
            result = work()
        except BaseException:
            self._broadcast(1)
            raise
        self._broadcast(0)
        return result

    def _broadcast(self, value: int) -> int:
        """Rank 0's ``value``, in every process."""
        import torch
        import torch.distributed as dist

        message = torch.tensor([value])
        with peer_errors(self):
            dist.broadcast(message, src=0)
        return int(message)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            self._sum([0.0])

    def mean(self, value: float) -> float:
        """Of the fp32 values that the processes have, in fp32."""
        return value if self.size == 1 else self._sum([value], wide=False)[0] / self.size

    def agree(self, elapsed: float, stop: int | None) -> tuple[float, int | None]:
        """Rank 0's clock, and a signal that any process was sent: the same for all.

        Every decision that hangs on one of them (the learning rate of a run limited by time, its
        end) has to be the same in each process, or the next exchange would never end.
        """
        if self.size == 1:
            return elapsed, stop
        elapsed, *signals = self._sum(
            [elapsed if self.is_main else 0.0] + [float(stop == n) for n in range(1, 32)]
        )
        return elapsed, next((n for n, sent in enumerate(signals, 1) if sent), None)

    def require_same(self, what: str, value: int) -> None:
        """Raises `InputError` where the processes do not all find the same ``value``."""
        if self.size > 1 and self._sum([float(value)])[0] != self.size * value:
            raise InputError(
                f"rank {self.rank} finds {value} as {what}, others do not; the run folder has to "
                "be one that all processes share"
            )

    def _sum(self, values: list[float], wide: bool = True) -> list[float]:
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
        with peer_errors(self):
            dist.all_reduce(total)
        out: list[float] = total.tolist()
        return out

    def replicate(self, model: Transformer) -> Replica:
        """The loss of ``model``, whose backward pass averages the gradients over the processes."""
        return Replica(model, self)


class Replica:
    """Computes a model's loss; in one of several processes, through DistributedDataParallel."""

    def __init__(self, model: Transformer, world: World) -> None:
        self._model, self._world = model, world

    @cached_property
    def _parallel(self) -> DistributedDataParallel | None:
        # Made when first used: it waits for the other processes, and hands out rank 0's weights.
        return _parallel(self._model) if self._world.size > 1 else None

    def loss(self, x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self._parallel or self._model.loss)(x_BT, y_BT)
        return loss

    def alone(self) -> AbstractContextManager[object]:
        """A context in which gradients only add up here: for all parts of a batch but the last."""
        return self._parallel.no_sync() if self._parallel is not None else nullcontext()


def _parallel(model: Transformer) -> DistributedDataParallel:
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
            return self.model.loss(x_BT, y_BT)

    # The model's buffers are constants; torch 2.13 has given this option another name.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    option: dict[str, Any] = {name: False}
    return DistributedDataParallel(Loss(), **option)


def is_main() -> bool:
    """Whether this process is the run's only one or rank 0, told before `joined`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[World]:
    """Joins the processes that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    import torch
    import torch.distributed as dist

    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    ours = not dist.is_initialized()
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if ours:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout=PATIENCE,
            store=_store(),
            rank=world.rank,
            world_size=world.size,
        )
    failed = True
    try:
        yield world
        failed = False
    finally:
        # NCCL would wait for work that the others, after an error, never take part in.
        if ours and not (failed and gpu):
            _leave()


def _store() -> Any:
    """Where the processes find each other's addresses.

    torchrun keeps it when it starts them again (``--max-restarts``, torch 2.13), and the new ones
    would find the addresses of the dead: each start gets names of its own. Several machines
    count their starts apart, so there it stays as it is.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://", timeout=PATIENCE))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return PrefixStore(f"start {start}", store) if alone else store


def _leave() -> None:
    """Ends the group. gloo's threads would outlive that while anything, such as
    DistributedDataParallel, still holds the group, and abort the process when it exits."""
    import torch
    import torch.distributed as dist

    if dist.group.WORLD is not None:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        if hasattr(backend, "shutdown"):
            backend.shutdown()
    dist.destroy_process_group()


@contextmanager
def peer_errors(world: World) -> Iterator[None]:
    """Turns what torch says when another process is gone into a `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _is_loss_of_peer(error):
            raise
        raise PeerError(f"rank {world.rank}: another process of this run has ended") from error


def _is_loss_of_peer(error: RuntimeError) -> bool:
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection closed" in text
