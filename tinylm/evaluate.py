"""Honest evaluation: loss, accuracy, and bits per byte that charge for every unknown word."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tinylm.device import Device
from tinylm.model import Attention, Transformer

IGNORE = -100
# Rows of logits alive at once: more leave a processor's cache; a GPU wants larger products.
ROWS = {"cpu": 256, "cuda": 4096}
LN2 = math.log(2)


@dataclass
class Totals:
    """Sums over evaluated tokens; ``unk`` counts targets that are ``<UNK>``."""

    tokens: int = 0
    unk: int = 0
    nats: float = 0.0
    known_nats: float = 0.0
    top1: int = 0
    top5: int = 0
    known_top1: int = 0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def rates(self) -> dict[str, float | None]:
        known = self.tokens - self.unk
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "top1": self.top1 / self.tokens,
            "top5": self.top5 / self.tokens,
            "unk_share": self.unk / self.tokens,
            "known_loss": self.known_nats / known if known else None,
            "known_top1": self.known_top1 / known if known else None,
        }


@dataclass(frozen=True)
class EvalText:
    """What is known of an evaluated text beside its tokens, see `tinylm.data`.

    ``bytes`` is the size of the text that the tokens code; ``unk_bits`` the cost of spelling
    all its unknown words, 0 where there is no ``<UNK>``.
    """

    bytes: int
    unk_bits: float = 0.0


def windows(
    ids: np.ndarray, seq_len: int, eos_id: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream into windows in which every token is a target exactly once.

    The first token is predicted from an end-of-text token; the last window is padded with
    ``IGNORE``. With a ``limit`` of tokens, windows are spread evenly over the stream.

    Returns:
        inputs and targets, int64 (windows, T).
    """
    count = -(-len(ids) // seq_len)
    padded = np.full(count * seq_len, IGNORE, dtype=np.int64)
    padded[: len(ids)] = ids
    targets = padded.reshape(count, seq_len)
    inputs = np.concatenate(([eos_id], padded[:-1])).reshape(count, seq_len)
    if limit is not None and limit < len(ids):
        chosen = np.linspace(0, count - 1, max(1, limit // seq_len)).round().astype(np.int64)
        inputs, targets = inputs[chosen], targets[chosen]
    return np.where(inputs == IGNORE, eos_id, inputs), targets


@torch.no_grad()
def evaluate(
    model: Transformer,
    ids: np.ndarray,
    *,
    eos_id: int,
    unk_id: int | None = None,
    seq_len: int | None = None,
    limit: int | None = None,
    device: Device | None = None,
    prefix_only: bool = True,
) -> Totals:
    """Sums of loss and hits over a token stream, each token predicted from those before it.

    Windows do not overlap, so a token sees on average half of ``seq_len`` tokens of context.

    Args:
        seq_len: window length, ``max_seq_len`` if None.
        limit: evaluate only about this many tokens, spread evenly.
        device: where and in which precision to run; fp32 where the model is if None.
        prefix_only: for a model without causal mask, hide the future: each position is computed
            from its prefix. False gives the leaked figure: inputs then contain the targets.
    """
    training = model.training
    model.eval()
    seq_len = min(seq_len or model.config.max_seq_len, max(1, len(ids)))
    inputs, targets = windows(ids, seq_len, eos_id, limit)
    where = next(model.parameters()).device
    evaluator = Evaluator(model, unk_id, device, prefix_only)
    for start in range(0, len(inputs), batch := batch_size(seq_len)):
        part = slice(start, start + batch)
        evaluator.add(_sent(inputs[part], where), _sent(targets[part], where))
    model.train(training)
    return evaluator.totals()


def batch_size(seq_len: int) -> int:
    """Windows at once."""
    return max(1, 8192 // seq_len)


class Evaluator:
    """Adds up loss and hits of one batch of windows after another.

    All of it happens on the device, where nothing waits for it until `totals`. The weights are the
    model's own, as they are when a batch is added.

    Args: see `evaluate`.
    """

    def __init__(
        self,
        model: Transformer,
        unk_id: int | None = None,
        device: Device | None = None,
        prefix_only: bool = True,
    ) -> None:
        where = next(model.parameters()).device
        self._shown = _masked(model) if prefix_only and model.config.n_layers == 1 else model
        self._device, self._where, self._prefix_only = device, where, prefix_only
        self._sums = _Sums(model, where, unk_id)

    def add(self, x_BT: Tensor, y_BT: Tensor) -> None:
        """Of inputs, and targets that may be ``IGNORE``."""
        with self._device.autocast() if self._device else _fp32(self._where):
            for h_NC, positions in _positions(self._shown, x_BT, self._prefix_only):
                self._sums.add(h_NC, y_BT[:, positions].flatten())

    def clear(self) -> None:
        self._sums.clear()

    def totals(self) -> Totals:
        return self._sums.totals()


@torch.no_grad()
def evaluate_full_prefix(
    model: Transformer, ids: np.ndarray, *, seq_len: int, first: int, limit: int
) -> Totals:
    """Sums over single tokens, each predicted from the whole ``seq_len`` tokens before it.

    What the last position of a window knows: no model can look ahead there, and none has to
    make do with less than a window. Computed in fp32.

    Args:
        first: the first token that may be chosen, at least ``seq_len``; the same for models with
            different windows gives them the same tokens.
        limit: how many tokens, spread evenly.
    """
    count = min(limit, len(ids) - first)
    if count < 1:
        return Totals()
    training = model.training
    model.eval()
    where = next(model.parameters()).device
    sums = _Sums(model, where, None)
    targets = np.linspace(first, len(ids) - 1, count).round().astype(np.int64)
    batch = max(1, 8192 // seq_len)
    for start in range(0, count, batch):
        at = targets[start : start + batch]
        x_BT = _sent(ids[at[:, None] + np.arange(-seq_len, 0)].astype(np.int64), where)
        with _fp32(where):
            sums.add(model.hidden(x_BT)[:, -1], _sent(ids[at].astype(np.int64), where))
    model.train(training)
    return sums.totals()


def _sent(ids: np.ndarray, where: torch.device) -> Tensor:
    """On the device, without waiting for a GPU."""
    tensor = torch.from_numpy(ids)
    return (
        tensor.pin_memory().to(where, non_blocking=True)
        if where.type == "cuda"
        else tensor.to(where)
    )


def _fp32(where: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(where.type, enabled=False)


def _masked(model: Transformer) -> Transformer:
    """The very same weights with a causal mask.

    A model of one layer then computes what it would from each prefix alone: its keys and values
    are those of single tokens, which no later token changes.
    """
    if model.config.causal:
        return model
    masked = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    for part in masked.modules():
        if isinstance(part, Transformer | Attention):
            part.config = replace(part.config, causal=True)
    return masked


def _positions(
    model: Transformer, x_BT: Tensor, prefix_only: bool
) -> Iterator[tuple[Tensor, slice]]:
    """Hidden states of positions: all at once or, to hide the future, one prefix length a time."""
    if model.config.causal or not prefix_only:
        yield model.hidden(x_BT).flatten(0, 1), slice(None)
        return
    for length in range(1, x_BT.shape[1] + 1):
        yield model.hidden(x_BT[:, :length])[:, -1], slice(length - 1, length)


class _Sums:
    """`Totals` in the making, on the device, where nothing waits for them until the end."""

    def __init__(self, model: Transformer, where: torch.device, unk_id: int | None) -> None:
        self._model, self._unk_id = model, unk_id
        self._rows = ROWS.get(where.type, 4096)
        self._sums = torch.zeros(7, dtype=torch.float64, device=where)

    def add(self, h_NC: Tensor, y_N: Tensor) -> None:
        """Of hidden states, and the tokens that follow them; none where that is ``IGNORE``."""
        for start in range(0, len(y_N), self._rows):
            y = y_N[start : start + self._rows]
            logits_NV = self._model.logits(h_NC[start : start + self._rows]).float()
            own_N = logits_NV.gather(1, y.clamp(min=0)[:, None])
            # Rank among all logits; ties count against the model.
            rank_N = (logits_NV >= own_N).sum(dim=1) - 1
            token_N = (y != IGNORE).float()
            nats_N = (torch.logsumexp(logits_NV, dim=1) - own_N.squeeze(1)) * token_N
            first_N, fifth_N = (rank_N < 1) * token_N, (rank_N < 5) * token_N
            known_N = token_N if self._unk_id is None else (y != self._unk_id) * token_N
            rows = token_N, known_N, nats_N, nats_N * known_N, fifth_N, first_N, first_N * known_N
            self._sums += torch.stack(rows).sum(dim=1, dtype=torch.float64)

    def clear(self) -> None:
        self._sums.zero_()

    def totals(self) -> Totals:
        tokens, known, nats, known_nats, top5, top1, known_top1 = self._sums.tolist()
        counts = int(top1), int(top5), int(known_top1)
        return Totals(int(tokens), int(tokens - known), nats, known_nats, *counts)


def bits_per_byte(totals: Totals, text: EvalText) -> float:
    """All bits it takes to write the text down with the model's help, over its size in bytes.

    Every token is paid for, ends of documents too, and every ``<UNK>`` with the bits that spell
    the word, so a small vocabulary cannot look good by forgetting.
    """
    return (totals.nats / LN2 + text.unk_bits) / text.bytes
