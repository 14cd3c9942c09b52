"""What counting alone achieves: n-gram models to hold a trained model against.

Interpolated Kneser–Ney smoothing with one discount for each order (Kneser and Ney 1995, in the
interpolated form of Chen and Goodman 1999): for an n-gram ``hw`` that was seen ``c(hw)`` times,

    p(w | h) = max(c(hw) - D, 0) / c(h) + D N(h) / c(h) * p(w | h'),

where ``N(h)`` is the number of different words seen after ``h``, ``h'`` is ``h`` without its first
word, and ``D = n1 / (n1 + 2 n2)`` of the numbers of n-grams seen once and twice. Below the highest
order ``c(hw)`` is the number of different words seen before ``hw``. The order below one is uniform.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.evaluate import IGNORE, Totals, windows

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}
# Fitting takes about 50 bytes a token, so this many need 1 GB. Of a longer text, evenly spread
# pieces with this many tokens in all are counted.
MOST_TOKENS = 20_000_000
PIECES = 64

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.integer[Any]]


class NGramModel:
    """Kneser–Ney model of one order, as tables in ascending order of their keys.

    A key holds the words of an n-gram as the digits of a number to the base of the vocabulary's
    size, the last word lowest; the key of its context is the same number without that digit.
    """

    def __init__(self, keys: _Ints, counts: _Ints, vocab_size: int, order: int) -> None:
        """``keys`` ascend and are distinct; most callers want `fit`."""
        self.vocab_size, self.order = vocab_size, order
        self._keys, self._suffixes = keys, vocab_size ** (order - 1)
        self._lower = None
        if order > 1:
            shorter = np.unique(keys % self._suffixes, return_counts=True)
            self._lower = NGramModel(*shorter, vocab_size, order - 1)
        self._contexts, first = np.unique(keys // vocab_size, return_index=True)
        discount = _discount(counts)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        followers = np.diff(first, append=len(keys))
        self._left = discount * followers / totals  # the probability that the order below shares
        self._p = (counts - discount) / np.repeat(totals, followers)
        self._p += np.repeat(self._left, followers) * self._shorter(keys)
        self._set_best(first, followers)

    @classmethod
    def fit(cls, ids: _Ids, vocab_size: int, order: int) -> "NGramModel":
        """Counts a stream of tokens, each below ``vocab_size``.

        Raises:
            InputError: the stream is shorter than one n-gram, or the vocabulary too large for
                n-grams to be 64-bit numbers.
        """
        if len(ids) < order:
            raise InputError(f"{len(ids)} tokens are too few to count n-grams of {order}")
        if vocab_size**order >= 1 << 63:
            raise InputError(f"a vocabulary of {vocab_size:,} is too large to count {order}-grams")
        keys, counts = np.unique(_ngrams(ids, vocab_size, order), return_counts=True)
        return cls(keys, counts, vocab_size, order)

    def probabilities(self, keys: _Ints) -> _Floats:
        """p(w | h) of n-grams ``hw`` of this order, seen or not."""
        place, seen = _find(self._keys, keys)
        p = np.empty(len(keys))
        p[seen] = self._p[place[seen]]
        unseen = keys[~seen]
        context, known = _find(self._contexts, unseen // self.vocab_size)
        p[~seen] = np.where(known, self._left[context], 1.0) * self._shorter(unseen)
        return p

    def best(self, contexts: _Ints) -> _Ints:
        """The likeliest word after each context; of equally likely ones the lowest id."""
        place, known = _find(self._contexts, contexts)
        best = self._best[place]
        if self._lower is not None:
            shorter = contexts[~known] % (self._suffixes // self.vocab_size)
            best[~known] = self._lower.best(shorter)
        return best

    def _shorter(self, keys: _Ints) -> _Floats:
        if self._lower is None:
            return np.full(len(keys), 1.0 / self.vocab_size)
        return self._lower.probabilities(keys % self._suffixes)

    def _set_best(self, first: npt.NDArray[np.intp], followers: npt.NDArray[np.intp]) -> None:
        """The likeliest word after a context has followed it, or is the shorter context's."""
        top = np.maximum.reduceat(self._p, first)
        ties = np.flatnonzero(self._p == np.repeat(top, followers))
        _, one = np.unique(np.searchsorted(first, ties, side="right"), return_index=True)
        self._best = self._keys[ties[one]] % self.vocab_size
        if self._lower is not None:
            other = self._lower.best(self._contexts % (self._suffixes // self.vocab_size))
            p = self.probabilities(self._contexts * self.vocab_size + other)
            better = (p > top) | ((p == top) & (other < self._best))
            self._best[better] = other[better]


def evaluate_baselines(
    train: _Ids,
    valid: _Ids,
    *,
    vocab_size: int,
    eos_id: int,
    unk_id: int | None = None,
    seq_len: int = 1,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Totals]:
    """Sums over exactly the tokens that `tinylm.evaluate.evaluate` takes with the same arguments.

    Every token is predicted from the one or two before it, across documents too; before the first
    stands an end of text, as for a model. ``top5`` is not counted and stays 0.

    Args:
        train: tokens to fit on; of more than `MOST_TOKENS`, evenly spread pieces.
        say: told of a part only being counted.
    """
    if len(train) > MOST_TOKENS:
        say(f"baselines count {MOST_TOKENS:,} of the {len(train):,} training tokens")
    counted = _spread(train, MOST_TOKENS)
    at = windows(np.arange(len(valid)), seq_len, 0, limit)[1].ravel()
    at = at[at != IGNORE]
    out = {}
    for name, order in ORDERS.items():
        model = NGramModel.fit(counted, vocab_size, order)
        before = np.full(order - 1, eos_id, dtype=np.int64)
        keys = _ngrams(np.concatenate([before, valid]), vocab_size, order)[at]
        out[name] = _totals(model, keys, unk_id)
    return out


def _totals(model: NGramModel, keys: _Ints, unk_id: int | None) -> Totals:
    targets = keys % model.vocab_size
    nats = -np.log(model.probabilities(keys))
    hits = model.best(keys // model.vocab_size) == targets
    known = np.ones(len(keys), dtype=bool) if unk_id is None else targets != unk_id
    return Totals(
        tokens=len(keys),
        unk=int((~known).sum()),
        nats=float(nats.sum()),
        known_nats=float(nats[known].sum()),
        top1=int(hits.sum()),
        known_top1=int(hits[known].sum()),
    )


def _spread(ids: _Ids, most: int) -> _Ids:
    """At most about ``most`` tokens, in pieces from everywhere."""
    if len(ids) <= most:
        return ids
    length = max(1, most // PIECES)
    starts = np.linspace(0, len(ids) - length, PIECES).astype(np.int64)
    return np.concatenate([ids[start : start + length] for start in starts])


def _ngrams(ids: _Ids, vocab_size: int, order: int) -> _Ints:
    """The key of every n-gram of a stream."""
    count = len(ids) - order + 1
    keys = ids[:count].astype(np.int64)
    for k in range(1, order):
        keys *= vocab_size
        keys += ids[k : k + count]
    return keys


def _discount(counts: _Ints) -> float:
    """The estimate of Ney et al. 1994; where nothing was seen once, any value in (0, 1) will do."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _find(table: _Ints, keys: _Ints) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Where each key is in the ascending ``table``, 0 if absent, and whether it is."""
    place = np.searchsorted(table, keys)
    place[place == len(table)] = 0
    return place, table[place] == keys
