"""Optimizers and the learning-rate schedule.

Muon (Jordan et al. 2024) follows, for each weight matrix, the orthogonalised direction of its
momentum: every singular value of the update is pushed towards one, so that rare directions learn
as fast as frequent ones. Embeddings, norms and biases are not maps between hidden spaces and
stay with AdamW (Loshchilov and Hutter 2019).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylm.config import TrainConfig
from tinylm.kernels.muon import Matrix, MuonOptions, muon_step
from tinylm.model import Transformer


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step's size is ``lr * sqrt(max(1, M / N))``.

    Args:
        params: pairs (matrix, number of equal maps stacked along its rows), see
            `Transformer.matrices`.
        dtype: of the orthogonalisation's products; bf16 is precise enough and twice as fast
            where the device has it.

    Attributes:
        found_inf: as torch's fused optimizers have it: a number on the device; where it is 1, a
            step leaves parameters and momenta as they are.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[tuple[torch.nn.Parameter, int]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype, self._stacked = dtype, dict(params)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(self._stacked), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closures
        for group in self.param_groups:
            matrices = [
                Matrix(
                    parameter, parameter.grad, self._momentum(parameter), self._stacked[parameter]
                )
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            options = group["lr"], group["momentum"], group["weight_decay"]
            muon_step(matrices, MuonOptions(*options, self._dtype, self.found_inf))

    def _momentum(self, parameter: Tensor) -> Tensor:
        if not self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = self.state[parameter]["momentum"]
        return momentum


# At the peak learning rate matrices and embeddings keep exp(-1) and exp(-1/2) of themselves in an
# epoch, unless it is so short that they would lose more than 1 % in a step: the time in which
# weights forget should be a part of the time in which they see all the text (Wang and Aitchison
# 2024). Measurements are in docs/recipe.md.
MATRIX_DECAY, EMBEDDING_DECAY, LARGEST_DECAY = 1.0, 0.5, 0.01


class Decay(NamedTuple):
    """Decoupled weight decay, which a step multiplies by its learning rate."""

    matrices: float
    embeddings: float


def weight_decay(config: TrainConfig, steps_per_epoch: float) -> Decay:
    """What ``config`` asks for, and where it leaves it open, what fits the length of an epoch."""
    matrix_lr = config.muon_lr if config.optimizer == "muon" else config.lr

    def fitting(per_epoch: float, lr: float) -> float:
        return min(per_epoch / steps_per_epoch, LARGEST_DECAY) / lr

    matrices, embeddings = config.weight_decay, config.embedding_decay
    if matrices is None:
        matrices = fitting(MATRIX_DECAY, matrix_lr)
    if embeddings is None:
        embeddings = fitting(EMBEDDING_DECAY, config.lr)
    return Decay(matrices, embeddings)


class Optimizer:
    """The optimizers of one run, stepped together; knows its state by parameter names.

    Args:
        muon_dtype: see `Muon`.
        steps_per_epoch: what weight decay is fitted to that ``config`` leaves open.
        on_device: learning rates are tensors beside the parameters, for steps that the host only
            sets off, and a CUDA graph may hold. Then AdamW is torch's fused one.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        muon_dtype: torch.dtype = torch.float32,
        on_device: bool = False,
        steps_per_epoch: float = math.inf,
    ) -> None:
        named = dict(model.named_parameters())
        where = next(model.parameters()).device
        matrices = model.matrices()
        on_muon = matrices if config.optimizer == "muon" else {}
        decayed = [p for n, p in named.items() if n in matrices and n not in on_muon]
        embeddings = {n: p for n, p in named.items() if n in ("embedding.weight", "head.weight")}
        others = [p for n, p in named.items() if n not in matrices and n not in embeddings]
        self._names: dict[Tensor, str] = {p: n for n, p in named.items()}
        self.decay = weight_decay(config, steps_per_epoch)

        adamw = torch.optim.AdamW(
            [
                {"params": others, "weight_decay": 0.0},
                {"params": list(embeddings.values()), "weight_decay": self.decay.embeddings},
                {"params": decayed, "weight_decay": self.decay.matrices},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=where.type != "mps",
        )
        self._parts: list[torch.optim.Optimizer] = [adamw]
        if on_muon:
            pairs = [(named[name], stacked) for name, stacked in on_muon.items()]
            self._parts.append(
                Muon(pairs, config.muon_lr, weight_decay=self.decay.matrices, dtype=muon_dtype)
            )
        for part in self._parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]
                if on_device:
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=where)

    def step(self, lr_factor: float) -> None:
        """One update at ``lr_factor`` times the peak learning rates; clears the gradients."""
        self.set_lr(lr_factor)
        self.update()
        self.zero_grad()

    def set_lr(self, factor: float) -> None:
        """Learning rates for the updates to come; those on a device are set without a wait."""
        for part in self._parts:
            for group in part.param_groups:
                lr = group["peak_lr"] * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def update(self, found_inf: Tensor | None = None) -> None:
        """One update; none where ``found_inf``, a number on the device, is 1 and not 0."""
        for part in self._parts:
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    @property
    def capturable(self) -> bool:
        """Whether steps are being captured, of which torch wants to be told."""
        return bool(self._parts[0].param_groups[0]["capturable"])

    @capturable.setter
    def capturable(self, on: bool) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["capturable"] = on

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as named tensors: ``PARAMETER.KEY``."""
        return {
            f"{self._names[parameter]}.{key}": value
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; torch itself places the tensors where they belong."""
        for part in self._parts:
            state: dict[int, dict[str, Tensor]] = {}
            parameters = [p for group in part.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                prefix = self._names[parameter] + "."
                state[index] = {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
            part.load_state_dict({**part.state_dict(), "state": state})


def lr_factor(config: TrainConfig, progress: float) -> float:
    """Share of the peak learning rate at ``progress`` (0 … 1) through the run.

    Warm-up, stable, decay (Hu et al. 2024): linear up, constant, linear down to zero.
    """
    if config.schedule == "constant":
        return 1.0
    if progress < config.warmup:
        # Not from zero: the first step of a run would change nothing.
        return max(progress / config.warmup, 0.01)
    if progress > 1 - config.decay:
        return max((1 - progress) / config.decay, 0.0)
    return 1.0
