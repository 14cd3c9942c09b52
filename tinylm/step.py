"""One training step: the gradient of a batch, computed in parts, and the update it leads to.

`TrainStep` looks at the loss and the gradient's norm before it updates anything;
`tinylm.device_step.DeviceStep` leaves all that to a GPU.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tinylm.config import TrainConfig
from tinylm.data.windows import WindowSampler
from tinylm.device import Device
from tinylm.distributed import World, peer_errors
from tinylm.errors import InputError, TrainingError
from tinylm.memory import advice, is_out_of_memory
from tinylm.model import Transformer
from tinylm.optim import Optimizer

GROWTH_STEPS = 2000  # good steps after which the loss scale doubles


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients from vanishing (Micikevicius et al. 2018)."""

    value: float = 65536.0
    good_steps: int = 0  # since it last changed

    def adapt(self, good: bool) -> None:
        """Doubles after 2,000 good steps, halves at an overflow."""
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.value /= 2
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        loss: nats per token, mean over the batch of all processes.
        grad_norm: of the whole gradient, before clipping.
        updated: False where loss or gradient was not finite: weights and optimizer are as before.
        overflow: the gradient was too large for fp16 at the loss scale of this step, which
            happens now and then and needs nobody's attention.
        step: its number in the run, from 1.
        lr_factor: share of the peak learning rates.
    """

    loss: float
    grad_norm: float
    updated: bool
    overflow: bool = False
    step: int = 0
    lr_factor: float = 1.0


class Step(ABC):
    """Turns the batches of a run into updates of the weights.

    A batch is computed in parts of ``micro_batch_size`` windows. Their gradients add up to that
    of the batch, except that a sum in another order is rounded otherwise.

    Attributes:
        about: how steps run, and why, in one line.
        scale: the loss scale (fp16), kept in checkpoints.

    Raises:
        InputError: the batch cannot be divided by processes and parts.
    """

    about: str
    scale: LossScale

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        config: TrainConfig,
        device: Device,
        world: World | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.world = world or World()
        self.micro_batch_size = _micro_batch_size(config, self.world.size)
        self._replica = self.world.replicate(model)
        self._parameters = list(model.parameters())

    @abstractmethod
    def begin(self, step: int, skipped: int) -> None:
        """Prepares for step number ``step`` + 1, after ``skipped`` that failed in a row."""

    @abstractmethod
    def issue(self, step: int, lr_factor: float) -> list[Outcome]:
        """Sets off step number ``step`` (from 1), which follows the one before.

        Returns:
            Outcomes that have become known since the last call, in order: of this step, or of
            earlier ones.

        Raises:
            TrainingError: memory ran out, or another process has ended (`PeerError`).
        """

    @abstractmethod
    def settle(self) -> list[Outcome]:
        """Waits for every step that was issued; the outcomes not returned yet."""

    def _accumulate(self, x_BT: Tensor, y_BT: Tensor, scale: float | Tensor) -> Tensor:
        """Adds up the gradients of all parts, times ``scale`` in fp16; returns the mean loss."""
        count, micro = len(x_BT), self.micro_batch_size
        total = torch.zeros((), device=x_BT.device)
        for start in range(0, count, micro):
            last, part = start + micro == count, slice(start, start + micro)
            with nullcontext() if last else self._replica.alone():
                with self.device.autocast():
                    loss = self._replica.loss(x_BT[part], y_BT[part]) * (micro / count)
                scaled = loss * scale if self.device.precision == "fp16" else loss
                scaled.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Where memory runs out, `TrainingError` says what takes it."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            count = self.model.parameter_count()
            text = advice(self.config, self.micro_batch_size, count, self.device)
            raise TrainingError(text) from error


class TrainStep(Step):
    """Each step is over, and looked at, before the next one begins.

    Args:
        sampler: where `issue` takes its batches from.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        config: TrainConfig,
        device: Device,
        world: World | None = None,
        sampler: WindowSampler | None = None,
    ) -> None:
        super().__init__(model, optimizer, config, device, world)
        self._sampler, self.scale = sampler, LossScale()
        self.about = "eager"
        if self.world.size > 1:
            self.about += f": {self.world.size} processes exchange their gradients"

    def begin(self, step: int, skipped: int) -> None:
        pass  # nothing is known here of a step but what it is given

    def issue(self, step: int, lr_factor: float) -> list[Outcome]:
        assert self._sampler is not None
        batch = self._sampler.batch(step - 1, self.world.rank, self.world.size)
        return [replace(self(*batch, lr_factor), step=step, lr_factor=lr_factor)]

    def settle(self) -> list[Outcome]:
        return []

    def __call__(self, inputs: np.ndarray, targets: np.ndarray, lr_factor: float) -> Outcome:
        """One step on this process's windows (int64, both (B / processes, T)).

        Raises:
            TrainingError: memory ran out, or another process has ended (`PeerError`).
        """
        with self._memory_told():
            with peer_errors(self.world):
                total = self._backward(inputs, targets)
            loss, norm = self.world.mean(float(total)), self._clip()
            good = math.isfinite(loss) and math.isfinite(norm)
            if good:
                self.optimizer.step(lr_factor)
        if not good:
            self.optimizer.zero_grad()
        return Outcome(loss, norm, good, self._adapt_scale(loss, norm))

    def _backward(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        """Adds up the gradients of all parts; returns the mean loss."""
        where = self.device.torch_device
        x_BT, y_BT = (torch.from_numpy(ids).to(where) for ids in (inputs, targets))
        return self._accumulate(x_BT, y_BT, self.scale.value)

    def _clip(self) -> float:
        """Unscales (fp16) and clips the gradients; returns their norm before clipping."""
        if self.device.precision == "fp16":
            for gradient in self._gradients():
                gradient /= self.scale.value
        norm, limit = float(torch.nn.utils.get_total_norm(self._gradients())), self.config.clip
        # torch would multiply by 1 where nothing is to be clipped: a pass over all of them.
        if limit and not norm + 1e-6 <= limit:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, torch.tensor(norm))
        return norm

    def _adapt_scale(self, loss: float, norm: float) -> bool:
        """Whether an overflow explains that the norm is not finite."""
        if self.device.precision != "fp16" or not math.isfinite(loss):
            return False
        self.scale.adapt(math.isfinite(norm))
        return not math.isfinite(norm) and self.scale.value >= 1.0


def _micro_batch_size(config: TrainConfig, processes: int) -> int:
    if config.batch_size % processes:
        raise InputError(
            f"batch_size {config.batch_size} is not divisible by {processes} processes"
        )
    share = config.batch_size // processes
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise InputError(
            f"the {share} windows of each of {processes} processes are not divisible by "
            f"micro_batch_size {micro}"
        )
    return micro
