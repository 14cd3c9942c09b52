"""Initial embeddings against a dense decomposition, and on text where nothing can be counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import embeddings
from tinylm.config import DataConfig, TrainConfig
from tinylm.data import Dataset, prepare
from tinylm.data.windows import WindowSampler
from tinylm.embeddings import cooccurrence_embedding, initial_model, unseen_and_rare
from tinylm.model import Transformer
from tinylm.optim import Optimizer


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


TEXTS = ("the cat sat on the mat", "a dog, and a cat", "naïve – 1 2 3 4 5 6 7 8 9 0")
DOCUMENTS = [f"{i} {text}" for i in range(40) for text in TEXTS]


def bpe_dataset(tmp_path: Path) -> Dataset:
    write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    data = DataConfig(data=str(tmp_path / "text.jsonl"), tokenizer="bpe", vocab_size=300)
    return prepare(data, progress=False)


def small_config(dataset: Dataset, **options: Any) -> TrainConfig:
    options = {"d_model": 16, "d_ff": 24, "n_heads": 2, "seq_len": 8, "seed": 3} | options
    config = TrainConfig.from_preset("modern", **options)
    return replace(config, model=replace(config.model, vocab_size=dataset.tokenizer.vocab_size))


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_embedding_and_its_scale_start_otherwise(tmp_path: Path, tied: bool) -> None:
    dataset = bpe_dataset(tmp_path)
    config = small_config(dataset, tie_embeddings=tied)
    plain = Transformer(config.model, seed=3).state_dict()
    ours = initial_model(config, dataset, torch.device("cpu")).state_dict()
    different = {n for n, weight in ours.items() if not torch.equal(weight, plain[n])}
    assert different == {"embedding.weight"} | ({"norm.weight"} if tied else set())


def test_a_random_start_is_the_plain_model(small_run: Any, tmp_path: Path) -> None:
    config = small_run(embedding_init="random")
    dataset = prepare(config.data, progress=False)
    config = replace(config, model=replace(config.model, vocab_size=dataset.tokenizer.vocab_size))
    ours = initial_model(config, dataset, torch.device("cpu")).state_dict()
    plain = Transformer(config.model, seed=config.seed).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in ours.items())


def test_tokens_that_never_occur_learn_what_rare_bytes_learn(tmp_path: Path) -> None:
    dataset = bpe_dataset(tmp_path)
    counts = np.bincount(dataset.train.ids, minlength=dataset.tokenizer.vocab_size)
    unseen, rare = unseen_and_rare(dataset)
    assert (counts[unseen] == 0).all()
    assert (counts == 0).sum() == len(unseen) > 100
    assert (counts[rare] > 0).all()
    assert all(len(dataset.tokenizer.id_to_token(i)) == 1 for i in rare)
    assert (np.diff(counts[rare]) >= 0).all()

    config = small_config(dataset, embedding_init="random")
    plain = Transformer(config.model, seed=3)
    ours = initial_model(config, dataset, torch.device("cpu"))
    with torch.no_grad():
        mean = plain.embedding.weight[rare].mean(dim=0)
        plain.embedding.weight[unseen] = mean
    assert torch.equal(plain.embedding.weight, ours.embedding.weight)
    ids_BT = torch.from_numpy(dataset.train.ids[:40].astype(np.int64)).view(4, 10)
    for model in (plain, ours):
        model.loss(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
    expected, grad = plain.embedding.weight.grad, ours.embedding.weight.grad
    assert expected is not None
    expected[unseen] = expected[rare].mean(dim=0)
    torch.testing.assert_close(grad, expected)


def test_a_text_in_another_script_costs_less(tmp_path: Path) -> None:
    """Bytes that training lacks are not pushed out of reach."""
    dataset = bpe_dataset(tmp_path)
    config = small_config(dataset, batch_size=8, muon_lr=0.02)  # fast enough for so few steps
    ids = torch.tensor(dataset.tokenizer.encode("мир"))[None]
    losses = {}
    for name in ("plain", "ours"):
        model = initial_model(config, dataset, torch.device("cpu"))
        if name == "plain":
            state = model.state_dict()
            model = Transformer(config.model, seed=3)
            model.load_state_dict(state)
        optimizer = Optimizer(model, config)
        sampler = WindowSampler(dataset.train.ids, config.seq_len, config.batch_size)
        for step in range(60):
            x, y = (torch.from_numpy(a) for a in sampler.batch(step))
            model.loss(x, y).backward()
            optimizer.step(1.0)
        losses[name] = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert losses["ours"] < losses["plain"] - 0.5
