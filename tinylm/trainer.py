"""Training: one step function, a loop that can be stopped and resumed anywhere, and its record."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from tinylm import kernels
from tinylm.checkpoint import Checkpoint, CheckpointFolder, load_tensors, save_tensors
from tinylm.config import TrainConfig
from tinylm.data import Dataset
from tinylm.data.invented_scripts import with_invented_scripts
from tinylm.data.windows import WindowSampler
from tinylm.device import (
    Device,
    changed_conditions,
    conditions,
    freed_memory_kept,
)
from tinylm.device_step import DeviceStep, runs_on_device
from tinylm.distributed import PeerError, World
from tinylm.embeddings import initial_model
from tinylm.errors import InputError, TrainingError
from tinylm.eta import Eta
from tinylm.metrics import MetricsFile, plot_loss, write_samples
from tinylm.milestones import Milestones, Validation, draw_samples
from tinylm.optim import Optimizer, lr_factor
from tinylm.progress import TrainingProgress, duration
from tinylm.signals import Interrupted, stop_requests
from tinylm.step import LossScale, Outcome, Step, TrainStep
from tinylm.watch import Watch


@dataclass
class Progress:
    """What changes as a run goes on, beside weights and optimizer: saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0  # seconds
    best_loss: float = math.inf
    best_step: int = 0
    loss_sum: float = 0.0  # since the last record
    loss_count: int = 0
    epoch_sum: float = 0.0  # since the epoch began
    epoch_count: int = 0


class Trainer:
    """One run: a model, its data, and the loop between them.

    Args:
        config: with the vocabulary size of the data filled in.
        folder: the run folder, which has to exist only once the run begins.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: Path,
        device: Device,
        progress: TrainingProgress,
        world: World | None = None,
    ) -> None:
        text_tokens = len(dataset.train)
        dataset = with_invented_scripts(dataset, config.invented_scripts, config.seed)
        self.invented_tokens = len(dataset.train) - text_tokens
        self.config, self.dataset, self.folder, self.device = config, dataset, folder, device
        self.progress = progress
        self.world = world or World()
        self.model = initial_model(config, dataset, device.torch_device)
        self.sampler = WindowSampler(
            dataset.train.ids, config.seq_len, config.batch_size, config.stride, config.seed
        )
        self.step = self._make_step()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.keep_checkpoints)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.total_steps = self._total_steps()
        self.state, self.watch = Progress(), Watch()
        self._news: list[Outcome] = []  # of steps that ended, not yet looked at
        self._last: dict[str, float] = {}  # what the newest record says
        self._session_start = self._last_checkpoint = time.monotonic()
        self.eta = Eta(lambda: time.monotonic())
        self.milestones = Milestones(config, self.total_steps, len(dataset.valid.ids), self.eta)
        on_device = runs_on_device(device, self.world)
        self.validation = Validation(self.model, dataset, config, device, on_device, progress.say)

    def _make_step(self) -> Step:
        config, device, world = self.config, self.device, self.world
        on_device = runs_on_device(device, world)
        muon_dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
        epoch = self.sampler.steps_per_epoch
        self.optimizer = Optimizer(self.model, config, muon_dtype, on_device, epoch)
        parts = self.model, self.optimizer, config, device
        if on_device:
            return DeviceStep(*parts, self.sampler, self.progress.say)
        return TrainStep(*parts, world, self.sampler)

    def _total_steps(self) -> int | None:
        """None when the run is limited by time."""
        if self.config.minutes is not None:
            return None
        if self.config.steps is not None:
            return self.config.steps
        return max(1, math.ceil((self.config.epochs or 1.0) * self.sampler.steps_per_epoch))

    @property
    def share(self) -> float:
        """How much of the run is done, 0 … 1."""
        if self.total_steps is not None:
            return min(1.0, self.state.step / self.total_steps)
        assert self.config.minutes is not None
        return min(1.0, self.state.elapsed / (self.config.minutes * 60))

    # --- the loop --------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Goes back to the newest whole checkpoint, if there is one.

        Raises:
            InputError: no checkpoint is whole, or the run is to be deterministic and would go on
                under other conditions than it began.
        """
        checkpoint = self.checkpoints.load_newest(self.progress.say)
        if self.world.is_main:
            self.metrics.drop_after(-1 if checkpoint is None else checkpoint.step)
        if checkpoint is None:
            return False
        tensors = checkpoint.tensors
        model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        optim = {n.removeprefix("optim."): t for n, t in tensors.items() if n.startswith("optim.")}
        self.model.load_state_dict(model)
        self.optimizer.load_state_tensors(optim)
        state = dict(checkpoint.state)
        try:
            there, here = state.pop("conditions"), self._conditions()
            if changed := changed_conditions(there, here, self.config.deterministic):
                self.progress.say(changed)
            self.step.scale = LossScale(**state.pop("loss_scale"))
            self.watch = Watch(**state.pop("watch"))
            self.state = Progress(**state)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint is of another version of tinylm ({error}); start with --fresh"
            ) from error
        if self.world.is_main and math.isfinite(self.state.best_loss):
            self._check_best()
        return True

    def _conditions(self) -> dict[str, Any]:
        return conditions(self.device) | {
            "processes": self.world.size,
            "micro_batch_size": self.step.micro_batch_size,
            "kernels": kernels.fingerprint(self.device.name),
        }

    def _check_best(self) -> None:
        """The best weights are in no checkpoint: if their file is damaged, they are found anew."""
        try:
            load_tensors(self.folder / "model.safetensors")
        except InputError as error:
            self.progress.say(f"{error}; keeping the best weights from here on")
            self.state.best_loss = math.inf

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            TrainingError: the loss is not finite, memory ran out, or another process has ended.
            InputError: the disk is full or not writable; what was saved is untouched.
        """
        try:
            with freed_memory_kept(self.device):
                self._loop()
        except InputError as error:
            raise InputError(f"{error}; {self._saved()}") from error

    def _loop(self) -> None:
        self._session_start = self._last_checkpoint = time.monotonic()
        before = self.state.elapsed
        if self.world.is_main and math.isinf(self.state.best_loss):
            # As precise, and as slow, as the last: so it is known how long those to come take.
            with self.eta.interruption("first evaluation"):
                self._evaluate(precise=True)
            with self.eta.interruption("sample"):
                self._sample()
        self.step.begin(self.state.step, self.watch.skipped_until(self.state.step))
        with stop_requests(self.progress.say) as request:
            while self.share < 1.0:
                share = self.share
                try:
                    self._train_step(share)
                    elapsed = before + time.monotonic() - self._session_start
                    self.state.elapsed, stop = self.world.agree(elapsed, request.signum)
                    self._look()
                except PeerError as error:
                    self._left_alone(error)
                if self.world.is_main:
                    self._after_step(share)
                if stop is not None and self.share < 1.0:
                    self._settle()
                    self.save_checkpoint()
                    raise Interrupted(stop, self.state.step)
            self.save_checkpoint()

    def _left_alone(self, error: PeerError) -> NoReturn:
        """Saves the last step that all processes finished, and gives up."""
        self._look()  # That step may be done, and its loss not recorded yet.
        self.save_checkpoint()
        saved = self._saved() if self.world.is_main else "rank 0 saves, if it can"
        raise PeerError(
            f"{error} at step {self.state.step + 1:,}; {saved}, and the same command goes on from "
            "there"
        ) from error

    def _train_step(self, share: float) -> None:
        """Sets off the next step; what it did may become known only steps later."""
        state = self.state
        self._news = self.step.issue(state.step + 1, lr_factor(self.config, share))
        state.step += 1
        state.tokens = self._tokens(state.step)

    def _settle(self) -> None:
        """Waits for all steps that were set off, and looks at what they did."""
        self._news = self.step.settle()
        self._look()

    def _look(self) -> None:
        news, self._news = self._news, []
        for outcome in news:
            if not (outcome.updated or outcome.overflow):
                self._not_finite(outcome)
            self._last = {"lr": self.config.lr * outcome.lr_factor}
            if math.isfinite(outcome.grad_norm):
                self._last["grad_norm"] = outcome.grad_norm
            if math.isfinite(outcome.loss):
                self._add_loss(outcome)
            if self.world.is_main and outcome.step % self.config.log_every == 0:
                self._record(outcome.step)

    def _add_loss(self, outcome: Outcome) -> None:
        state, loss, step = self.state, outcome.loss, outcome.step
        state.loss_sum += loss
        state.loss_count += 1
        state.epoch_sum += loss
        state.epoch_count += 1
        usual = self.watch.spike(loss)
        if usual is not None and self.world.is_main:
            self.progress.say(
                f"loss spike at step {step:,}: {loss:.3f} where {usual:.3f} was usual"
            )
            self.metrics.append(self._stamp(step) | {"spike": loss, "usual_loss": usual})

    def _not_finite(self, outcome: Outcome) -> None:
        """Stops, or lets the run go on without the step that failed, as configured."""
        step = outcome.step
        what = (
            f"the loss or its gradient is not finite at step {step:,} "
            f"(loss {outcome.loss}, gradient norm {outcome.grad_norm})"
        )
        bearable = self.watch.skip(step)
        if self.config.on_nan == "skip" and bearable:
            if self.world.is_main:
                self.progress.say(f"{what}: this step is skipped")
                self.metrics.append(self._stamp(step) | {"skipped": what})
            return
        if not bearable:
            what += f", after {self.watch.skipped - 1} skipped in a row"
        # This step changed nothing, nor did any issued since: what the weights have learned is
        # still good.
        self.state.step, self.state.tokens = step - 1, self._tokens(step - 1)
        self.save_checkpoint()
        self.world.wait()
        if not self.world.is_main:  # all come here, one tells
            raise SystemExit(1)
        raise TrainingError(
            f"{what}; {self._saved()}. Try a lower --lr, --precision fp32, or --on-nan skip"
        )

    def _saved(self) -> str:
        steps = self.checkpoints.steps()
        return f"the last good checkpoint is of step {steps[-1]:,}" if steps else "nothing is saved"

    # --- what happens between steps --------------------------------------------------------------

    def _after_step(self, share_before: float) -> None:
        state, per_epoch = self.state, self.sampler.steps_per_epoch
        ended, moment = self.share >= 1.0, (state.step, share_before, self.share)
        epoch_ended = state.step // per_epoch > (state.step - 1) // per_epoch
        evaluation = self.milestones.evaluation_due(*moment)
        sample = self.milestones.sample_due(*moment)
        if ended or epoch_ended or evaluation or sample:
            self._settle()
        if ended:
            self._record(state.step)
        if epoch_ended:
            self._end_epoch()
        if evaluation:
            with self.eta.interruption("evaluation"):
                self._evaluate()
        if sample:
            with self.eta.interruption("sample"):
                self._sample()
        if time.monotonic() - self._last_checkpoint > self.config.checkpoint_seconds:
            self._settle()
            self.save_checkpoint()
        self._show()

    def _record(self, step: int) -> None:
        state = self.state
        if not state.loss_count:  # every step was skipped
            return
        mean = state.loss_sum / state.loss_count
        self._last["loss"] = mean
        self.metrics.append(self._stamp(step) | self._last)
        if self.config.preset == "notebook":  # which showed its progress so
            epoch, batch = divmod(step - 1, math.ceil(self.sampler.steps_per_epoch))
            self.progress.say(f"epoch {epoch + 1}, batch {batch + 1:,}, loss {mean:.4f}")
        state.loss_sum, state.loss_count = 0.0, 0

    def _stamp(self, step: int | None = None) -> dict[str, Any]:
        """When a record was made: after ``step``, the newest if None."""
        state, step = self.state, self.state.step if step is None else step
        tokens = self._tokens(step)
        return {
            "step": step,
            "tokens": tokens,
            "elapsed": round(state.elapsed, 3),
            "tokens_per_second": round(tokens / state.elapsed if state.elapsed else 0.0, 1),
        }

    def _tokens(self, step: int) -> int:
        return step * self.config.batch_size * self.config.seq_len

    def _end_epoch(self) -> None:
        state = self.state
        epoch = round(state.step / self.sampler.steps_per_epoch)
        mean = state.epoch_sum / max(1, state.epoch_count)
        self.metrics.append(self._stamp() | {"epoch": epoch, "epoch_loss": mean})
        self.progress.say(f"epoch {epoch} completed, average loss {mean:.4f}")
        state.epoch_sum, state.epoch_count = 0.0, 0

    def _show(self) -> None:
        state = self.state
        mean = state.loss_sum / state.loss_count if state.loss_count else self.watch.usual_loss
        figures = {
            "step": f"{state.step:,}" + (f"/{self.total_steps:,}" if self.total_steps else ""),
            "loss": "-" if mean is None else f"{mean:.3f}",
            "": f"{state.tokens / max(state.elapsed, 1e-9) / 1000:.1f}k tokens/s",
        }
        if (left := self.seconds_left()) is not None:
            figures["left"] = duration(left)
        self.progress.update(self.share, figures)

    def seconds_left(self) -> float | None:
        """Until the run is evaluated on the whole validation split; None while unknown."""
        return self.milestones.seconds_left(self.state.step, self.share, self.state.elapsed)

    def _evaluate(self, precise: bool = False) -> None:
        """Loss on a fixed part of the validation split; keeps the weights if they are the best.

        Computed in the precision of training, or in fp32 if ``precise``.
        """
        state, record = self.state, self.validation(precise)
        loss, leaked = record["valid_loss"], record.get("valid_leaked_loss")
        self.metrics.append(self._stamp() | record)
        beside = "" if leaked is None else f" given the prefix only (leaked {leaked:.4f})"
        self.progress.say(
            f"step {state.step:,}: validation loss {loss:.4f}{beside}, "
            f"top-1 {record['valid_top1']:.1%}"
        )
        if loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            info = {"step": state.step, "valid_loss": loss}
            save_tensors(self.folder / "model.safetensors", self.model.state_dict(), info)

    def _sample(self) -> None:
        texts = draw_samples(self.model, self.dataset, self.config)
        self.metrics.append(self._stamp() | {"samples": texts})
        write_samples(self.metrics, self.folder / "samples.txt")
        first = " ".join(texts[0].split())
        self.progress.say(f"sample: {first}")

    def save_checkpoint(self) -> None:
        """Writes everything the run needs to go on; only rank 0 does.

        Raises:
            InputError: the disk is full or not writable; earlier checkpoints are untouched.
            TrainingError: the weights are not finite, so that going on from here is in vain.
        """
        if not self.world.is_main:
            return
        weights = self.model.state_dict()
        if not all(bool(t.isfinite().all()) for t in weights.values()):
            raise TrainingError(
                f"the weights are not finite after step {self.state.step:,}; {self._saved()}. "
                "Try a lower --lr"
            )
        tensors = {f"model.{n}": t for n, t in weights.items()}
        tensors |= {f"optim.{n}": t for n, t in self.optimizer.state_tensors().items()}
        state = vars(self.state) | {
            "loss_scale": vars(self.step.scale),
            "watch": vars(self.watch),
            "conditions": self._conditions(),
        }
        self.checkpoints.save(Checkpoint(self.state.step, tensors, state))
        self._last_checkpoint = time.monotonic()

    def finish(self) -> None:
        """Draws the plot; the weights kept are the best, not the last."""
        title = f"{self.config.preset}: {self.model.parameter_count():,} parameters"
        plot_loss(self.metrics, self.folder / "loss.png", title)
