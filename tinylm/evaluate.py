"""Honest evaluation: loss, accuracy, and bits per byte that charge for every unknown word."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylm.device import Device
from tinylm.model import Transformer

IGNORE = -100
ROWS = 256  # rows of logits alive at once; more leave a processor's cache
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
        prefix_only: for a model without causal mask, hide the future by computing each position
            anew from its prefix. False gives the leaked figure: inputs then contain the targets.
    """
    training = model.training
    model.eval()
    seq_len = min(seq_len or model.config.max_seq_len, max(1, len(ids)))
    inputs, targets = windows(ids, seq_len, eos_id, limit)
    where = next(model.parameters()).device
    totals = Totals()
    for start in range(0, len(inputs), batch := max(1, 8192 // seq_len)):
        x_BT = torch.from_numpy(inputs[start : start + batch]).to(where)
        y_BT = torch.from_numpy(targets[start : start + batch]).to(where)
        with device.autocast() if device else _fp32(where):
            for h_NC, y_N in _positions(model, x_BT, y_BT, prefix_only):
                _add(totals, model, h_NC, y_N, unk_id)
    model.train(training)
    return totals


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
    totals = Totals()
    if count < 1:
        return totals
    training = model.training
    model.eval()
    where = next(model.parameters()).device
    targets = np.linspace(first, len(ids) - 1, count).round().astype(np.int64)
    batch = max(1, 8192 // seq_len)
    for start in range(0, count, batch):
        at = targets[start : start + batch]
        x_BT = torch.from_numpy(ids[at[:, None] + np.arange(-seq_len, 0)].astype(np.int64))
        y_B = torch.from_numpy(ids[at].astype(np.int64))
        with _fp32(where):
            _add(totals, model, model.hidden(x_BT.to(where))[:, -1], y_B.to(where), None)
    model.train(training)
    return totals


def _fp32(where: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(where.type, enabled=False)


def _positions(
    model: Transformer, x_BT: Tensor, y_BT: Tensor, prefix_only: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and targets, all at once or, to hide the future, one prefix length a time."""
    if model.config.causal or not prefix_only:
        yield model.hidden(x_BT).flatten(0, 1), y_BT.flatten()
        return
    for length in range(1, x_BT.shape[1] + 1):
        yield model.hidden(x_BT[:, :length])[:, -1], y_BT[:, length - 1]


def _add(totals: Totals, model: Transformer, h_NC: Tensor, y_N: Tensor, unk_id: int | None) -> None:
    keep = y_N != IGNORE
    h_NC, y_N = h_NC[keep], y_N[keep]
    for start in range(0, len(y_N), ROWS):
        y = y_N[start : start + ROWS]
        logits_NV = model.logits(h_NC[start : start + ROWS]).float()
        own_N = logits_NV.gather(1, y[:, None])
        nats_N = torch.logsumexp(logits_NV, dim=1) - own_N.squeeze(1)
        # Rank among all logits; ties count against the model.
        rank_N = (logits_NV >= own_N).sum(dim=1) - 1
        known_N = torch.ones_like(y, dtype=torch.bool) if unk_id is None else y != unk_id
        totals.tokens += len(y)
        totals.unk += int((~known_N).sum())
        totals.nats += float(nats_N.double().sum())
        totals.known_nats += float(nats_N[known_N].double().sum())
        totals.top1 += int((rank_N < 1).sum())
        totals.top5 += int((rank_N < 5).sum())
        totals.known_top1 += int((rank_N[known_N] < 1).sum())


def bits_per_byte(totals: Totals, text: EvalText) -> float:
    """All bits it takes to write the text down with the model's help, over its size in bytes.

    Every token is paid for, ends of documents too, and every ``<UNK>`` with the bits that spell
    the word, so a small vocabulary cannot look good by forgetting.
    """
    return (totals.nats / LN2 + text.unk_bits) / text.bytes
