"""Training: one step function, a loop that can be stopped and resumed anywhere, and its record."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.checkpoint import Checkpoint, CheckpointFolder, save_tensors
from tinylm.config import TrainConfig
from tinylm.data import Dataset
from tinylm.data.windows import WindowSampler
from tinylm.device import Device
from tinylm.embeddings import initial_model
from tinylm.errors import TrainingError
from tinylm.evaluate import evaluate
from tinylm.generate import Sampling
from tinylm.lm import LanguageModel
from tinylm.metrics import MetricsFile, plot_loss, write_samples
from tinylm.optim import Optimizer, lr_factor
from tinylm.progress import TrainingProgress, duration

EVALUATIONS = 20  # in a run, unless eval_every says otherwise
SAMPLE_TOKENS = 40
SAMPLE_PROMPTS = 3
SPIKE = 2.0  # nats above the running mean that count as a loss spike


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; everything has been saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step:,}")
        self.signum, self.step = signum, step


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
    mean_loss: float | None = None
    loss_scale: float = 65536.0  # fp16 only
    good_steps: int = 0  # since the loss scale last changed


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
    ) -> None:
        self.config, self.dataset, self.folder, self.device = config, dataset, folder, device
        self.progress = progress
        self.model = initial_model(config, dataset, device.torch_device)
        muon_dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
        self.optimizer = Optimizer(self.model, config, muon_dtype)
        self.sampler = WindowSampler(
            dataset.train.ids, config.seq_len, config.batch_size, config.stride, config.seed
        )
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.keep_checkpoints)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.total_steps = self._total_steps()
        self.state = Progress()
        self._last: dict[str, float] = {}  # what the newest record says
        self._stop: int | None = None
        self._session_start = self._last_checkpoint = time.monotonic()
        self._session_share = 0.0

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
        """Goes back to the newest whole checkpoint, if there is one."""
        checkpoint = self.checkpoints.load_newest(self.progress.say)
        if checkpoint is None:
            self.metrics.drop_after(-1)
            return False
        tensors = checkpoint.tensors
        model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        optim = {n.removeprefix("optim."): t for n, t in tensors.items() if n.startswith("optim.")}
        self.model.load_state_dict(model)
        self.optimizer.load_state_tensors(optim)
        self.state = Progress(**checkpoint.state)
        self.metrics.drop_after(self.state.step)
        return True

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            TrainingError: the loss is not finite, or memory ran out.
        """
        self._session_start = self._last_checkpoint = time.monotonic()
        self._session_share = self.share
        before = self.state.elapsed
        if self.state.step == 0:
            self._evaluate()
        with self._signals():
            while self.share < 1.0:
                share = self.share
                self._train_step(share)
                self.state.elapsed = before + time.monotonic() - self._session_start
                self._after_step(share)
                if self._stop is not None and self.share < 1.0:
                    self.save_checkpoint()
                    raise Interrupted(self._stop, self.state.step)
            self.save_checkpoint()

    def _train_step(self, share: float) -> None:
        config, state = self.config, self.state
        inputs, targets = self.sampler.batch(state.step)
        micro = config.micro_batch_size or config.batch_size
        parts = config.batch_size // micro
        total = torch.zeros((), device=self.device.torch_device)
        try:
            for start in range(0, config.batch_size, micro):
                x_BT = torch.from_numpy(inputs[start : start + micro]).to(self.device.torch_device)
                y_BT = torch.from_numpy(targets[start : start + micro]).to(self.device.torch_device)
                with self.device.autocast():
                    loss = self.model.loss(x_BT, y_BT) / parts
                self._scaled(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            norm = self._clip()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise TrainingError(self._memory_advice()) from error
            raise
        loss_value = float(total)
        self._check_finite(loss_value, norm)
        if math.isfinite(norm):
            self.optimizer.step(lr_factor(config, share))
        else:  # only fp16 gets here: this batch overflowed at the present loss scale
            self.optimizer.zero_grad()
        state.step += 1
        state.tokens += inputs.size
        state.loss_sum += loss_value
        state.loss_count += 1
        state.epoch_sum += loss_value
        state.epoch_count += 1
        self._last = {"grad_norm": norm, "lr": config.lr * lr_factor(config, share)}

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.state.loss_scale if self.device.precision == "fp16" else loss

    def _clip(self) -> float:
        """Unscales (fp16) and clips the gradients; returns their norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.device.precision == "fp16":
            for p in parameters:
                assert p.grad is not None
                p.grad /= self.state.loss_scale
        limit = self.config.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if self.device.precision == "fp16":
            self._adapt_loss_scale(math.isfinite(norm))
        return norm

    def _adapt_loss_scale(self, good: bool) -> None:
        """Doubles after 2,000 good steps, halves at an overflow (Micikevicius et al. 2018)."""
        self.state.good_steps = self.state.good_steps + 1 if good else 0
        if not good:
            self.state.loss_scale /= 2
        elif self.state.good_steps == 2000:
            self.state.loss_scale, self.state.good_steps = self.state.loss_scale * 2, 0

    def _check_finite(self, loss: float, norm: float) -> None:
        overflow = self.device.precision == "fp16" and self.state.loss_scale >= 1.0
        if math.isfinite(loss) and (math.isfinite(norm) or overflow):
            return
        steps = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is of step {steps[-1]:,}" if steps else "nothing was saved"
        )
        raise TrainingError(
            f"the loss or its gradient is not finite at step {self.state.step + 1:,} "
            f"(loss {loss}, gradient norm {norm}); {kept}. Try a lower --lr or --precision fp32"
        )

    def _memory_advice(self) -> str:
        config = self.config
        micro = config.micro_batch_size or config.batch_size
        return (
            f"out of memory at step {self.state.step + 1:,} with {micro} windows of "
            f"{config.seq_len} tokens at once; lower --micro-batch-size (the result stays the "
            "same) or --seq-len"
        )

    # --- what happens between steps --------------------------------------------------------------

    def _after_step(self, share_before: float) -> None:
        config, state = self.config, self.state
        ended = self.share >= 1.0
        if state.step % config.log_every == 0 or ended:
            self._record()
        per_epoch = self.sampler.steps_per_epoch
        if state.step // per_epoch > (state.step - 1) // per_epoch:
            self._end_epoch()
        self._show()
        if ended or self._due(config.eval_every, share_before, EVALUATIONS):
            self._evaluate()
        if ended or self._due(config.sample_every, share_before, EVALUATIONS // 5):
            self._sample()
        if time.monotonic() - self._last_checkpoint > config.checkpoint_seconds:
            self.save_checkpoint()

    def _due(self, every: int | None, share_before: float, times: int) -> bool:
        """Every so many steps, or so many times a run."""
        if every is not None:
            return self.state.step % every == 0
        return math.floor(self.share * times) > math.floor(share_before * times)

    def _record(self) -> None:
        state = self.state
        mean = state.loss_sum / state.loss_count
        if state.mean_loss is not None and mean > state.mean_loss + SPIKE:
            self.progress.say(f"loss spike at step {state.step:,}: {mean:.3f}")
        smooth = 0.9
        state.mean_loss = (
            mean if state.mean_loss is None else smooth * state.mean_loss + (1 - smooth) * mean
        )
        self._last["loss"] = mean
        self.metrics.append(self._stamp() | self._last)
        if self.config.preset == "notebook":  # which showed its progress so
            epoch, batch = divmod(state.step - 1, math.ceil(self.sampler.steps_per_epoch))
            self.progress.say(f"epoch {epoch + 1}, batch {batch + 1:,}, loss {mean:.4f}")
        state.loss_sum, state.loss_count = 0.0, 0

    def _stamp(self) -> dict[str, Any]:
        state = self.state
        rate = state.tokens / state.elapsed if state.elapsed else 0.0
        return {
            "step": state.step,
            "tokens": state.tokens,
            "elapsed": round(state.elapsed, 3),
            "tokens_per_second": round(rate, 1),
        }

    def _end_epoch(self) -> None:
        state = self.state
        epoch = round(state.step / self.sampler.steps_per_epoch)
        mean = state.epoch_sum / state.epoch_count
        self.metrics.append(self._stamp() | {"epoch": epoch, "epoch_loss": mean})
        self.progress.say(f"epoch {epoch} completed, average loss {mean:.4f}")
        state.epoch_sum, state.epoch_count = 0.0, 0

    def _show(self) -> None:
        state = self.state
        mean = state.loss_sum / state.loss_count if state.loss_count else self._last["loss"]
        figures = {
            "step": f"{state.step:,}" + (f"/{self.total_steps:,}" if self.total_steps else ""),
            "loss": f"{mean:.3f}",
            "": f"{state.tokens / max(state.elapsed, 1e-9) / 1000:.1f}k tokens/s",
        }
        spent = time.monotonic() - self._session_start
        done = self.share - self._session_share
        if done > 0:
            figures["left"] = duration(spent / done * (1 - self.share))
        self.progress.update(self.share, figures)

    @property
    def _unk_id(self) -> int | None:
        return self.dataset.tokenizer.unk_id

    def _evaluate(self) -> None:
        """Loss on a fixed part of the validation split; keeps the weights if they are the best."""
        state = self.state
        options: dict[str, Any] = {
            "eos_id": self.dataset.tokenizer.eos_id,
            "unk_id": self._unk_id,
            "seq_len": self.config.seq_len,
            "limit": self.config.eval_tokens,
            "device": self.device,
        }
        totals = evaluate(self.model, self.dataset.valid.ids, **options)
        record = {"valid_loss": totals.loss, "valid_top1": totals.top1 / totals.tokens}
        text = f"step {state.step:,}: validation loss {totals.loss:.4f}"
        if not self.config.model.causal:
            leaked = evaluate(self.model, self.dataset.valid.ids, prefix_only=False, **options)
            record["valid_leaked_loss"] = leaked.loss
            text += f" given the prefix only (leaked {leaked.loss:.4f})"
        self.metrics.append(self._stamp() | record)
        self.progress.say(f"{text}, top-1 {record['valid_top1']:.1%}")
        if totals.loss < state.best_loss:
            state.best_loss, state.best_step = totals.loss, state.step
            info = {"step": state.step, "valid_loss": totals.loss}
            save_tensors(self.folder / "model.safetensors", self.model.state_dict(), info)

    def _sample(self) -> None:
        lm = LanguageModel(self.model.eval(), self.dataset.tokenizer, self.config)
        texts = []
        for prompt in self._prompts():
            sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed)
            texts.append(lm.continue_ids(prompt, sampling))
        self.model.train()
        self.metrics.append(self._stamp() | {"samples": texts})
        write_samples(self.metrics, self.folder / "samples.txt")
        first = " ".join(texts[0].split())
        self.progress.say(f"sample: {first}")

    def _prompts(self) -> Iterator[list[int]]:
        """How some validation documents begin: text the model has not seen, in its own domain."""
        valid = self.dataset.valid
        for i in range(min(SAMPLE_PROMPTS, valid.documents)):
            ids = valid.document(i)[:6].tolist()
            ids = [t for t in ids if t != self.dataset.tokenizer.eos_id]
            yield ids or [self.dataset.tokenizer.eos_id]

    def save_checkpoint(self) -> None:
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"optim.{n}": t for n, t in self.optimizer.state_tensors().items()}
        self.checkpoints.save(Checkpoint(self.state.step, tensors, vars(self.state).copy()))
        self._last_checkpoint = time.monotonic()

    def finish(self) -> None:
        """Draws the plot; the weights kept are the best, not the last."""
        title = f"{self.config.preset}: {self.model.parameter_count():,} parameters"
        plot_loss(self.metrics, self.folder / "loss.png", title)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Lets SIGINT and SIGTERM ask for a stop after the present step; a second one is obeyed."""

        def ask(signum: int, frame: object) -> None:
            self._stop = signum
            signal.signal(signum, old[signum])
            self.progress.say("stopping after this step; once more to stop at once")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old: dict[int, Any] = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)
