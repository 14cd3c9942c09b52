"""Training steps that run on a GPU from end to end; the host sets them off and reads along later.

A step is a function of tensors on the device: its number, the table of windows, learning rates,
loss scale. So all of it, from drawing windows to the optimizer, can be captured as one CUDA graph
and replayed. Whether a gradient is finite is decided there too: one that is not leaves weights and
optimizer as they are.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tinylm import graph
from tinylm.config import TrainConfig
from tinylm.data.feed import DeviceWindows, fits
from tinylm.data.windows import WindowSampler
from tinylm.device import Device
from tinylm.distributed import World
from tinylm.memory import size
from tinylm.model import Transformer
from tinylm.optim import Optimizer
from tinylm.step import GROWTH_STEPS, LossScale, Outcome, Step
from tinylm.watch import MOST_SKIPPED

LEAD = 100  # steps, at most, between two looks at the outcomes
UPDATED, OVERFLOW, FAILED = range(3)


def runs_on_device(device: Device, world: World) -> bool:
    """Whether a run's steps are `DeviceStep`: on one CUDA GPU. Others exchange with the host."""
    return device.type == "cuda" and world.size == 1


def about_steps(device: Device) -> str:
    """How training steps would run, for ``tinylm doctor``."""
    if runs_on_device(device, World()):
        return "one CUDA graph, which --no-cuda-graph turns off"
    return "eager: there are CUDA graphs on CUDA devices only"


class DeviceStep(Step):
    """Steps on one GPU, as one CUDA graph, or eager; without a graph on any other device.

    The outcome of each step goes into a log on the device, of which the host takes a copy every
    ``log_every`` steps (100 at most) and looks at it when the next is due, or it happens to be
    there. So the host is ahead of the device, by two such stretches at most.

    A step that fails, and is not to be skipped, halts the run there: all steps that were issued
    after it change nothing, nor does the number of the next step move on.

    Args:
        sampler: where batches come from.
        say: told why steps are not captured, when that turns out at the first.
        resident: whether the corpus is kept on the device; decided by its memory if None.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        config: TrainConfig,
        device: Device,
        sampler: WindowSampler,
        say: Callable[[str], None] = lambda text: None,
        resident: bool | None = None,
    ) -> None:
        super().__init__(model, optimizer, config, device)
        where, corpus = device.torch_device, sampler.tokens.nbytes
        if where.type == "cuda" and where.index is not None:
            torch.cuda.set_device(where)  # whose streams and graphs are meant from here on
        resident = fits(corpus, where) if resident is None else resident
        self.windows = DeviceWindows(sampler, where, resident)
        self._say, self._graphed = say, device.type == "cuda" and config.cuda_graph
        self.about = "one CUDA graph" if self._graphed else "eager, as asked"
        self.about += f"; {size(corpus)} of tokens " + (
            "on the GPU" if resident else "streamed to it, too many for its memory"
        )
        self._run: Callable[[], None] | None = None  # known at the first step
        self._lr_factor = math.nan

        def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=where)

        self._step = number(0, torch.int64)  # steps done
        self._skipped = number(0)  # in a row
        self._halted = number(0, torch.bool)
        self._scale, self._good_steps = number(LossScale.value), number(0)
        # loss, norm and what became of each step; the last row is that of halted ones.
        self._rows = min(config.log_every, LEAD)
        self._log = torch.zeros(self._rows + 1, 3, device=where)
        cuda = where.type == "cuda"
        self._copy = torch.zeros(self._log.shape, pin_memory=cuda)
        self._copied = None if not cuda else torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._issued: list[tuple[int, float]] = []  # numbers and rates: not copied yet,
        self._read: list[tuple[int, float]] = []  # and copied, or about to be

    # --- what the host does ----------------------------------------------------------------------

    @property
    def scale(self) -> LossScale:
        """As it is on the device, when that has come to the last step issued."""
        return LossScale(float(self._scale), int(self._good_steps))

    @scale.setter
    def scale(self, scale: LossScale) -> None:
        self._scale.fill_(scale.value)
        self._good_steps.fill_(scale.good_steps)

    def begin(self, step: int, skipped: int) -> None:
        self._step.fill_(step)
        self._skipped.fill_(skipped)
        self._halted.fill_(False)

    def issue(self, step: int, lr_factor: float) -> list[Outcome]:
        with self._memory_told():
            self.windows.prepare(step - 1)
            if lr_factor != self._lr_factor:
                self.optimizer.set_lr(lr_factor)
                self._lr_factor = lr_factor
            if self._run is None:
                self._run = self._captured() if self._graphed else self.compute
            self._run()
        self._issued.append((step, lr_factor))
        if step % self.config.log_every == 0 or len(self._issued) == self._rows:
            outcomes = self._outcomes()
            self._copy_log()
            return outcomes
        ready = self._copied is None or self._copied.query()  # type: ignore[no-untyped-call]
        return self._outcomes() if ready else []

    def settle(self) -> list[Outcome]:
        self.windows.settle()  # what is done between steps may be captured too
        outcomes = self._outcomes()
        self._copy_log()
        return outcomes + self._outcomes()

    def _copy_log(self) -> None:
        self._copy.copy_(self._log, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._read, self._issued = self._issued, []

    def _outcomes(self) -> list[Outcome]:
        """Of the steps whose log was copied, once it is here."""
        if not self._read:
            return []
        if self._copied is not None:
            self._copied.synchronize()
        out, log = [], self._copy.tolist()
        for step, lr_factor in self._read:
            loss, norm, became = log[(step - 1) % self._rows]
            how = became == UPDATED, became == OVERFLOW
            out.append(Outcome(loss, norm, *how, step=step, lr_factor=lr_factor))
        self._read = []
        return out

    def _captured(self) -> Callable[[], None]:
        """Replays the step, or computes it where capturing fails. The state stays as it is."""
        halted = self._halted.clone()
        self._halted.fill_(True)  # what runs to warm up changes nothing
        try:
            return graph.captured(self.compute, "steps", self._say, self._ready_for_capture)
        finally:
            self.optimizer.capturable = False
            self._halted.copy_(halted)

    def _ready_for_capture(self) -> None:
        self.windows.settle()
        self.optimizer.zero_grad()  # gradients are to lie in the graph's memory
        self.optimizer.capturable = True

    # --- what the device does --------------------------------------------------------------------

    def compute(self) -> None:
        """One step, by operations of the device alone."""
        self.optimizer.zero_grad()
        loss = self._accumulate(*self.windows.batch(self._step), self._scale)
        if self.device.precision == "fp16":
            torch._foreach_div_(self._gradients(), self._scale)
        norm = self._clip_norm()
        with torch.no_grad():
            good, live = (loss + norm).isfinite(), ~self._halted
            self.optimizer.update(found_inf=(~(good & live)).float())
            overflow = self._adapt_scale(loss, good, live)
            failed = ~(good | overflow)
            became = overflow * OVERFLOW + failed * FAILED
            self._note(torch.stack((loss, norm, became.float())), live)
            if self.config.on_nan == "skip":
                skipped = torch.where(failed, self._skipped + 1, 0)
                self._skipped.copy_(torch.where(live, skipped, self._skipped))
                failed = self._skipped > MOST_SKIPPED
            self._halted |= failed
            self._step += ~self._halted  # to the next, or to stay at the one that failed

    def _clip_norm(self) -> Tensor:
        """Clips the gradients; their norm before."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip or math.inf)

    def _adapt_scale(self, loss: Tensor, good: Tensor, live: Tensor) -> Tensor:
        """`LossScale.adapt`; whether an overflow explains that the gradient is not finite."""
        if self.device.precision != "fp16":
            return torch.zeros_like(good)
        counted = loss.isfinite()  # a loss that is not finite says nothing about the scale
        good_steps = (self._good_steps + 1) * good
        grown = good_steps == GROWTH_STEPS
        scale = torch.where(good, self._scale * (1 + grown.float()), self._scale / 2)
        seen = counted & live
        self._scale.copy_(torch.where(seen, scale, self._scale))
        self._good_steps.copy_(torch.where(seen, good_steps * ~grown, self._good_steps))
        return counted & ~good & (scale >= 1.0)

    def _note(self, outcome: Tensor, live: Tensor) -> None:
        row = torch.where(live, self._step % self._rows, self._rows)
        self._log.index_copy_(0, row.view(1), outcome[None])
