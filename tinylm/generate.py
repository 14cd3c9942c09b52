"""Continuing text: sampling from a model's next-token distribution, with a cache of the past."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.config import check_seed
from tinylm.errors import InputError
from tinylm.model import KVCache, Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the fewest tokens that together have this probability
            (nucleus sampling, Holtzman et al. 2020).
        repetition_penalty: above 1 makes tokens that have occurred less likely
            (Keskar et al. 2019).
        seed: makes the draw repeatable; the i-th prompt of a batch uses ``seed + i``.

    Raises:
        InputError: a value is out of its range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        if self.seed is not None:
            check_seed(self.seed)


def distribution(logits_V: Tensor, seen: Sequence[int], sampling: Sampling) -> Tensor:
    """Probabilities of the next token: penalty, temperature, top-k, top-p, in that order."""
    logits_V = logits_V.float()
    if sampling.repetition_penalty != 1.0 and seen:
        index = torch.tensor(sorted(set(seen)), device=logits_V.device)
        old = logits_V[index]
        penalty = sampling.repetition_penalty
        logits_V = logits_V.index_copy(0, index, torch.where(old > 0, old / penalty, old * penalty))
    if sampling.temperature < 1e-6:  # dividing by less would overflow
        return torch.zeros_like(logits_V).index_fill(0, logits_V.argmax(), 1.0)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        kept = logits_V.topk(sampling.top_k)
        logits_V = torch.full_like(logits_V, -torch.inf).index_copy(0, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = torch.softmax(logits_V, dim=-1).sort(descending=True)
        before = ordered.cumsum(0) - ordered
        logits_V = logits_V.index_fill(0, index[before >= sampling.top_p], -torch.inf)
    return torch.softmax(logits_V, dim=-1)


class Context:
    """The sequences being continued and the next token's logits, cached where that is exact."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], use_cache: bool
    ) -> None:
        self.model = model
        self.sequences = [list(prompt) for prompt in prompts]
        # Without a causal mask an old position changes with every new one: nothing to keep.
        self.use_cache = use_cache and model.config.causal
        self.cache: KVCache | None = None

    def next_logits(self) -> Tensor:
        """logits_BV of the token after each sequence."""
        limit = self.model.config.max_seq_len
        if self.cache is not None and self.cache.length < limit:
            ids_BT = self._tensor([sequence[-1:] for sequence in self.sequences])
            hidden_BTC = self.model.hidden(ids_BT, self.cache, self.start_BT)
            return self.model.logits(hidden_BTC[:, -1])
        longest = max(len(sequence) for sequence in self.sequences)
        # A full cache starts again from the last half of the context, so that a long text costs
        # two computations per token on average, not max_seq_len of them.
        refill = self.cache is not None or (self.use_cache and longest > limit)
        keep = max(1, limit // 2) if refill else limit
        return self._start(min(keep, longest))

    def _start(self, length: int) -> Tensor:
        """Computes the last ``length`` tokens of all sequences, shorter ones padded on the left."""
        recent = [sequence[-length:] for sequence in self.sequences]
        pads = [length - len(sequence) for sequence in recent]
        padded = [[0] * pad + sequence for pad, sequence in zip(pads, recent, strict=True)]
        ids_BT = self._tensor(padded)
        self.start_BT = self._tensor(pads)[:, None] if any(pads) else None
        if self.use_cache:
            like = self.model.embedding.weight
            self.cache = KVCache.empty(self.model.config, len(recent), like)
        return self.model.logits(self.model.hidden(ids_BT, self.cache, self.start_BT)[:, -1])

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self.model.embedding.weight.device)


@torch.no_grad()
def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    banned: Sequence[int] = (),
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continues all prompts at once; yields, step by step, one new token for each.

    A sequence that has drawn ``eos_id`` is over and yields None from then on; the generator ends
    when all are over or ``max_new_tokens`` is reached. The longest context a token is predicted
    from is the model's ``max_seq_len``.

    Args:
        prompts: at least one token each.
        banned: tokens never drawn.
    """
    if not prompts or not all(prompts):
        raise InputError("every prompt needs at least one token")
    generators = [torch.Generator() for _ in prompts]
    for i, generator in enumerate(generators):
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed + i)
    context = Context(model, prompts, use_cache)
    over = [False] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        logits_BV = context.next_logits().float().cpu()
        logits_BV[:, list(banned)] = -torch.inf
        drawn: list[int | None] = []
        for i, sequence in enumerate(context.sequences):
            probabilities_V = distribution(logits_BV[i], sequence, sampling)
            token = int(torch.multinomial(probabilities_V, 1, generator=generators[i]))
            over[i] = over[i] or token == eos_id
            sequence.append(eos_id if over[i] else token)
            drawn.append(None if over[i] else token)
        if all(over):
            return
        yield drawn
