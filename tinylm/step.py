"""One training step: the gradient of a batch, computed in parts, and the update it leads to."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylm.config import TrainConfig
from tinylm.device import Device
from tinylm.distributed import World, peer_errors
from tinylm.errors import InputError, TrainingError
from tinylm.memory import fixed_bytes, size, window_bytes
from tinylm.model import Transformer
from tinylm.optim import Optimizer


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
        elif self.good_steps == 2000:
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
    """

    loss: float
    grad_norm: float
    updated: bool
    overflow: bool = False


class TrainStep:
    """Turns a batch into an update of the weights.

    The batch is computed in parts of ``micro_batch_size`` windows. Their gradients add up to that
    of the batch, except that a sum in another order is rounded otherwise.

    Raises:
        InputError: the batch cannot be divided by processes and parts.
    """

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
        self.scale = LossScale()
        self._replica = self.world.replicate(model)

    def __call__(self, inputs: np.ndarray, targets: np.ndarray, lr_factor: float) -> Outcome:
        """One step on this process's windows (int64, both (B / processes, T)).

        Raises:
            TrainingError: memory ran out, or another process has ended (`PeerError`).
        """
        try:
            with peer_errors(self.world):
                total = self._backward(inputs, targets)
            loss, norm = self.world.mean(float(total)), self._clip()
            good = math.isfinite(loss) and math.isfinite(norm)
            if good:
                self.optimizer.step(lr_factor)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                raise TrainingError(self._memory_advice()) from error
            raise
        if not good:
            self.optimizer.zero_grad()
        return Outcome(loss, norm, good, self._adapt_scale(loss, norm))

    def _backward(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        """Adds up the gradients of all parts; returns the mean loss."""
        where, micro = self.device.torch_device, self.micro_batch_size
        total = torch.zeros((), device=where)
        for start in range(0, len(inputs), micro):
            last = start + micro == len(inputs)
            x_BT = torch.from_numpy(inputs[start : start + micro]).to(where)
            y_BT = torch.from_numpy(targets[start : start + micro]).to(where)
            with nullcontext() if last else self._replica.alone():
                with self.device.autocast():
                    loss = self._replica.loss(x_BT, y_BT) * (micro / len(inputs))
                self._scaled(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale.value if self.device.precision == "fp16" else loss

    def _clip(self) -> float:
        """Unscales (fp16) and clips the gradients; returns their norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.device.precision == "fp16":
            for p in parameters:
                assert p.grad is not None
                p.grad /= self.scale.value
        limit = self.config.clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _adapt_scale(self, loss: float, norm: float) -> bool:
        """Whether an overflow explains that the norm is not finite."""
        if self.device.precision != "fp16" or not math.isfinite(loss):
            return False
        self.scale.adapt(math.isfinite(norm))
        return not math.isfinite(norm) and self.scale.value >= 1.0

    def _memory_advice(self) -> str:
        config, micro = self.config, self.micro_batch_size
        fixed = fixed_bytes(config, self.model.parameter_count())
        scores = self.device.type == "cpu"
        value_bytes = 4 if self.device.precision == "fp32" else 2
        window = window_bytes(config.model, config.seq_len, value_bytes, scores)
        return (
            f"out of memory with {micro} windows (of --batch-size {config.batch_size}) of "
            f"{config.seq_len} tokens (--seq-len) at once: about {size(fixed)} for weights, "
            f"gradients and optimizer and {size(window)} for each window, {size(window * micro)} "
            "in all; lower --micro-batch-size (the result stays the same), or --seq-len"
        )


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


def _is_out_of_memory(error: Exception) -> bool:
    """torch has an exception of its own for GPUs only; a CPU's says it in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(
        words in text
        for words in ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
