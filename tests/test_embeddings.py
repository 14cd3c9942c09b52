"""Initial embeddings against a dense decomposition, and on text where nothing can be counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import embeddings
from tinylm.config import TrainConfig, with_fields
from tinylm.embeddings import cooccurrence_embedding, initial_model
from tinylm.model import Transformer


def stream(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Tokens that depend on the one before: i is followed by 2 i, give or take three."""
    random = np.random.default_rng(seed)
    ids = [0]
    for noise in random.integers(-3, 4, length - 1):
        ids.append((2 * ids[-1] + noise) % vocab_size)
    return np.array(ids, dtype=np.uint16)


def dense_embedding(ids: np.ndarray, vocab_size: int, width: int) -> np.ndarray:
    """The same in fp64 by numpy, up to a rotation."""
    table = np.zeros((vocab_size, vocab_size))
    np.add.at(table, (ids[:-1], ids[1:]), 1)
    of = np.bincount(ids, minlength=vocab_size) + 1
    with np.errstate(divide="ignore"):
        m = np.maximum(np.log(table * len(ids) / np.outer(of, of)), 0)
    u, s, _ = np.linalg.svd(np.hstack((m, m.T)), full_matrices=False)
    rows = u[:, :width] * np.sqrt(s[:width])
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True) / width)


@pytest.mark.parametrize(("vocab_size", "width"), [(41, 41), (41, 20), (23, 7)])
def test_equals_a_dense_decomposition(vocab_size: int, width: int) -> None:
    ids = stream(vocab_size, 5000)
    ours = cooccurrence_embedding(ids, vocab_size, width).double().numpy()
    dense = dense_embedding(ids, vocab_size, width)
    # Vectors are free up to a rotation, so compare their products.
    np.testing.assert_allclose(ours @ ours.T / width, dense @ dense.T / width, atol=0.02)


def test_tokens_in_the_same_places_are_alike() -> None:
    random = np.random.default_rng(0)
    nouns, verbs = random.integers(0, 10, 4000), random.integers(10, 20, 4000)
    rows = cooccurrence_embedding(np.stack((nouns, verbs), axis=1).ravel(), 20, 2)
    alike = rows @ rows.T / 2
    assert alike[:10, :10].min() > 0.8
    assert alike[10:, 10:].min() > 0.8
    assert alike[:10, 10:].max() < 0.4


@settings(deadline=None, max_examples=50)
@given(
    ids=st.lists(st.integers(0, 11), min_size=2, max_size=60),
    vocab_size=st.integers(12, 40),
    width=st.integers(1, 50),
)
def test_any_text_gives_rows_of_unit_mean_square(
    ids: list[int], vocab_size: int, width: int
) -> None:
    tokens = np.array(ids, dtype=np.uint16)
    rows = cooccurrence_embedding(tokens, vocab_size, width)
    assert rows.shape == (vocab_size, width)
    torch.testing.assert_close(rows.square().mean(dim=1), torch.ones(vocab_size))
    assert torch.equal(rows, cooccurrence_embedding(tokens, vocab_size, width))


def test_a_long_text_is_sampled_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "COUNTED_TOKENS", 640)
    ids = np.arange(5000, dtype=np.uint16)
    sample = embeddings._sample(ids)
    assert len(sample) == 640
    assert (sample[0], sample[-1]) == (0, 4999)
    assert (np.diff(sample) > 0).all()
    assert len(embeddings._sample(ids[:640])) == 640


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_embedding_and_its_scale_start_otherwise(tied: bool) -> None:
    small = {"d_model": 16, "d_ff": 24, "n_heads": 2, "tie_embeddings": tied, "seed": 3}
    config = with_fields(TrainConfig(embedding_init="cooccurrence"), small)
    config = replace(config, model=replace(config.model, vocab_size=50))
    plain = Transformer(config.model, seed=3).state_dict()
    ours = initial_model(config, stream(50, 3000)).state_dict()
    different = {n for n, weight in ours.items() if not torch.equal(weight, plain[n])}
    assert different == {"embedding.weight"} | ({"norm.weight"} if tied else set())
    random = initial_model(replace(config, embedding_init="random"), stream(50, 3000))
    assert all(torch.equal(w, plain[n]) for n, w in random.state_dict().items())
