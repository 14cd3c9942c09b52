"""N-gram baselines against counting in dictionaries, and as probability distributions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import baselines
from tinylm.baselines import NGramModel, evaluate_baselines
from tinylm.errors import InputError

EOS, UNK = 1, 0


class Plain:
    """The same model by dictionaries: the formula, one n-gram at a time."""

    def __init__(self, counts: Counter[tuple[int, ...]], vocab_size: int) -> None:
        self.vocab_size, self.order = vocab_size, len(next(iter(counts)))
        self.counts, self.total, self.followers = counts, Counter(), Counter()
        for ngram, count in counts.items():
            self.total[ngram[:-1]] += count
            self.followers[ngram[:-1]] += 1
        once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.5
        shorter = Counter(ngram[1:] for ngram in counts)
        self.lower = Plain(shorter, vocab_size) if self.order > 1 else None

    def p(self, ngram: tuple[int, ...]) -> float:
        h = ngram[:-1]
        shorter = self.lower.p(ngram[1:]) if self.lower else 1 / self.vocab_size
        if h not in self.total:
            return shorter
        left = self.discount * self.followers[h] / self.total[h]
        return max(self.counts[ngram] - self.discount, 0) / self.total[h] + left * shorter


def plain(ids: list[int], vocab_size: int, order: int) -> Plain:
    return Plain(Counter(zip(*(ids[k:] for k in range(order)), strict=False)), vocab_size)


STREAMS = st.integers(2, 7).flatmap(
    lambda V: st.tuples(st.just(V), st.lists(st.integers(0, V - 1), min_size=3, max_size=60))
)


@given(stream=STREAMS, order=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_context_has_a_distribution_equal_to_the_plain_one(
    stream: tuple[int, list[int]], order: int
) -> None:
    V, ids = stream
    model, slow = NGramModel.fit(np.array(ids), V, order), plain(ids, V, order)
    keys = np.arange(V**order)  # every n-gram there can be
    p_CV = model.probabilities(keys).reshape(-1, V)
    np.testing.assert_allclose(p_CV.sum(axis=1), 1.0, rtol=1e-12)
    assert (p_CV > 0).all()
    ngrams = np.stack(np.unravel_index(keys, (V,) * order), axis=1).tolist()
    expected = [slow.p(tuple(ngram)) for ngram in ngrams]
    np.testing.assert_allclose(p_CV.ravel(), expected, rtol=1e-12)
    best = model.best(np.arange(V ** (order - 1)))
    np.testing.assert_allclose(p_CV[np.arange(len(p_CV)), best], p_CV.max(axis=1), rtol=1e-12)


@pytest.mark.parametrize("limit", [None, 24])
def test_the_same_tokens_as_a_model_and_the_same_columns(limit: int | None) -> None:
    import torch

    from tinylm.config import ModelConfig
    from tinylm.evaluate import evaluate
    from tinylm.model import Transformer

    generator = np.random.default_rng(0)
    train, valid = (generator.integers(0, 9, n).astype(np.uint16) for n in (500, 67))
    options = {"eos_id": EOS, "unk_id": UNK, "seq_len": 8, "limit": limit}
    found = evaluate_baselines(train, valid, vocab_size=9, **options)
    model = Transformer(ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2, d_ff=8))
    with torch.no_grad():
        totals = evaluate(model, valid, **options)
    assert list(found) == ["unigram", "bigram", "trigram"]
    for order, sums in enumerate(found.values(), 1):
        assert (sums.tokens, sums.unk) == (totals.tokens, totals.unk)
        if limit is None:
            slow = plain(train.tolist(), 9, order)
            stream = [EOS] * (order - 1) + valid.tolist()
            ngrams = list(zip(*(stream[k:] for k in range(order)), strict=False))
            nats = [-np.log(slow.p(ngram)) for ngram in ngrams]
            assert sums.nats == pytest.approx(sum(nats))
            known = [n for n, ngram in zip(nats, ngrams, strict=True) if ngram[-1] != UNK]
            assert sums.known_nats == pytest.approx(sum(known))
            hits = [max(range(9), key=lambda w, h=g[:-1]: slow.p((*h, w))) == g[-1] for g in ngrams]
            assert sums.top1 == sum(hits)
            assert sums.known_top1 == sum(
                h for h, g in zip(hits, ngrams, strict=True) if g[-1] != UNK
            )


def test_only_a_part_of_a_large_corpus_is_counted_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "MOST_TOKENS", 640)
    said: list[str] = []
    train = np.repeat(np.arange(8), 1000)
    found = evaluate_baselines(train, train[::100], vocab_size=8, eos_id=EOS, say=said.append)
    assert said == ["baselines count 640 of the 8,000 training tokens"]
    # Every part of the corpus was seen: no word is as rare as one never seen.
    assert found["unigram"].loss == pytest.approx(np.log(8), rel=0.02)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match="2 tokens are too few"):
        NGramModel.fit(np.array([1, 2]), 5, 3)
    with pytest.raises(InputError, match=r"vocabulary of 3,000,000 is too large"):
        NGramModel.fit(np.arange(9), 3_000_000, 3)
