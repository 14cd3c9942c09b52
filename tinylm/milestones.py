"""What comes between the steps of a run, evaluations and samples: when, how, and for how long."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from tinylm.config import TrainConfig
from tinylm.data import Dataset
from tinylm.device import Device
from tinylm.device_evaluation import DeviceEvaluation
from tinylm.eta import Eta
from tinylm.evaluate import Totals, evaluate
from tinylm.generate import Sampling
from tinylm.lm import LanguageModel
from tinylm.model import Transformer

# In a run, after those it begins with, unless eval_every and sample_every say otherwise. Where
# the clock ends the run, fewer, if they would take too much of its time.
EVALUATIONS, SAMPLES = 20, 4
SAMPLE_TOKENS = 40
SAMPLE_PROMPTS = 3


class Milestones:
    """When a run is evaluated and sampled, and how long all of it still takes.

    Args:
        total_steps: None when the run is limited by time.
        valid_tokens: in the whole validation split, which the run ends with.
    """

    def __init__(
        self, config: TrainConfig, total_steps: int | None, valid_tokens: int, eta: Eta
    ) -> None:
        self._config, self._total_steps, self._eta = config, total_steps, eta
        self._valid_tokens = valid_tokens

    def evaluation_due(self, step: int, share_before: float, share: float) -> bool:
        """After ``step``, which took the run from one share (0 … 1) to the next."""
        due = self._due(self._config.eval_every, EVALUATIONS, step, share_before, share)
        return due and self._affordable(self._config.eval_every, share, "evaluation")

    def sample_due(self, step: int, share_before: float, share: float) -> bool:
        """As `evaluation_due`."""
        due = self._due(self._config.sample_every, SAMPLES, step, share_before, share)
        return due and self._affordable(self._config.sample_every, share, "sample")

    def _affordable(self, every: int | None, share: float, kind: str) -> bool:
        asked = every is not None or self._config.minutes is None or share >= 1.0
        return asked or self._eta.has_room(kind, "first evaluation")

    @staticmethod
    def _due(every: int | None, times: int, step: int, share_before: float, share: float) -> bool:
        """Every so many steps, or so many times a run."""
        if share >= 1.0:
            return True
        if every is not None:
            return step % every == 0
        return math.floor(share * times) > math.floor(share_before * times)

    def seconds_left(self, step: int, share: float, elapsed: float) -> float | None:
        """Until the run is evaluated on the whole validation split; None while unknown."""
        config, eta = self._config, self._eta
        steps = eta.steps(share)
        evaluations = self._times_left(config.eval_every, EVALUATIONS, step, share)
        samples = self._times_left(config.sample_every, SAMPLES, step, share)
        if config.minutes is not None:  # which the clock ends, whatever fills them
            steps = max(0.0, config.minutes * 60 - elapsed)
            evaluations = samples = 1 if share < 1.0 else 0
        if steps is None:
            return None
        shortened = min(config.eval_tokens, self._valid_tokens)
        last = eta.cost("first evaluation", "evaluation") * self._valid_tokens / shortened
        between = evaluations * eta.cost("evaluation", "first evaluation")
        return steps + between + samples * eta.cost("sample") + last

    def _times_left(self, every: int | None, times: int, step: int, share: float) -> int:
        """How often something is still to come, the last time at the end of the run."""
        if every is None or self._total_steps is None or share >= 1.0:
            return times - math.floor(share * times)
        return math.ceil(self._total_steps / every) - step // every


class Validation:
    """Loss and top-1 on a fixed part of the validation split, as a model learns; of a model that
    looks ahead, the leaked loss too.

    Args:
        on_device: evaluations are `DeviceEvaluation`, captured as CUDA graphs unless ``config``
            has none.
        say: told why they are not captured, where that fails.
    """

    def __init__(
        self,
        model: Transformer,
        dataset: Dataset,
        config: TrainConfig,
        device: Device,
        on_device: bool,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._dataset, self._config = model, dataset, config
        self._device, self._on_device, self._say = device, on_device, say
        self._kept: dict[bool, DeviceEvaluation] = {}  # by whether the future is hidden

    def __call__(self, precise: bool = False) -> dict[str, float]:
        """The record of the weights as they are, computed in the precision of training, or in
        fp32 if ``precise``."""
        totals = self._totals(precise, prefix_only=True)
        record = {"valid_loss": totals.loss, "valid_top1": totals.top1 / totals.tokens}
        if not self._config.model.causal:
            record["valid_leaked_loss"] = self._totals(precise, prefix_only=False).loss
        return record

    def _totals(self, precise: bool, prefix_only: bool) -> Totals:
        config, ids, tokenizer = self._config, self._dataset.valid.ids, self._dataset.tokenizer
        options: dict[str, Any] = {
            "eos_id": tokenizer.eos_id,
            "unk_id": tokenizer.unk_id,
            "seq_len": config.seq_len,
            "limit": config.eval_tokens,
            "device": None if precise else self._device,
            "prefix_only": prefix_only,
        }
        if precise or not self._on_device:  # precise ones are not made again and again
            return evaluate(self._model, ids, **options)
        if prefix_only not in self._kept:
            graphed = self._device.type == "cuda" and config.cuda_graph
            options |= {"graphed": graphed, "say": self._say}
            self._kept[prefix_only] = DeviceEvaluation(self._model, ids, **options)
        return self._kept[prefix_only]()


def draw_samples(model: Transformer, dataset: Dataset, config: TrainConfig) -> list[str]:
    """Texts that go on from the beginnings of a few validation documents."""
    lm = LanguageModel(model.eval(), dataset.tokenizer, config)
    texts = []
    for i, prompt in enumerate(_prompts(dataset)):
        sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, seed=config.seed + i)
        texts.append(lm.continue_ids(prompt, sampling))
    model.train()
    return texts


def _prompts(dataset: Dataset) -> Iterator[list[int]]:
    """How some validation documents begin: text the model has not seen, in its own domain."""
    valid, eos_id = dataset.valid, dataset.tokenizer.eos_id
    for i in range(min(SAMPLE_PROMPTS, valid.documents)):
        ids = [t for t in valid.document(i)[:6].tolist() if t != eos_id]
        yield ids or [eos_id]
