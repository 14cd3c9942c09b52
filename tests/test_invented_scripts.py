"""Text in invented scripts: the same text in other letters, behind the text as it was."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.config import DataConfig, TrainConfig
from tinylm.data import Dataset, TokenFile, invented_scripts, prepare
from tinylm.data.invented_scripts import BLOCK, FIRST, LAST, PIECE, with_invented_scripts
from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer, Tokenizer

TEXTS = [f"{i} The cat sat on the mat, naïvely: {i * i} times. " * 20 for i in range(60)]
TOKENIZER = BPETokenizer.train(TEXTS, vocab_size=300)


def dataset_of(documents: list[list[int]], tokenizer: Tokenizer = TOKENIZER) -> Dataset:
    ids = np.array([i for document in documents for i in document], dtype=np.uint16)
    ends = np.cumsum([0, *map(len, documents)])
    return Dataset(Path(), {}, tokenizer, {"train": TokenFile(ids, ends)})


WHOLE = dataset_of([TOKENIZER.encode(text, add_eos=True) for text in TEXTS])


def added(share: float, seed: int = 0, whole: Dataset = WHOLE) -> list[np.ndarray]:
    """The new documents; what was there is as it was."""
    old, new = whole.train, with_invented_scripts(whole, share, seed).train
    assert np.array_equal(new.ids[: len(old)], old.ids)
    assert np.array_equal(new.offsets[: old.documents + 1], old.offsets)
    assert new.dtype == old.dtype
    assert new.offsets[-1] == len(new)
    return [new.document(i) for i in range(old.documents, new.documents)]


def test_the_share_is_kept() -> None:
    for share in (0.05, 0.3):
        pieces = added(share)
        assert {len(piece) for piece in pieces} == {PIECE}
        assert abs(sum(map(len, pieces)) - share * len(WHOLE.train)) <= PIECE / 2
        assert all(piece[-1] == TOKENIZER.eos_id for piece in pieces)


def test_letters_change_and_nothing_else_does() -> None:
    pieces = added(0.3)
    starts = np.linspace(0, len(WHOLE.train) - PIECE, len(pieces)).astype(int)
    for piece, start in zip(pieces, starts, strict=True):
        there = WHOLE.train.ids[start : start + PIECE]
        theirs = TOKENIZER.decode(there[there != TOKENIZER.eos_id])
        ours = TOKENIZER.decode(piece[:-1]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert len(ours) > 100
        pairs = list(zip(theirs, ours, strict=False))
        alphabet = {a: b for a, b in pairs if a.isascii() and a.isalpha()}
        assert len(set(alphabet.values())) == len(alphabet) > 10
        codes = [ord(b) for b in alphabet.values()]
        assert FIRST <= min(codes) <= max(codes) < LAST
        assert max(codes) - min(codes) < BLOCK
        assert all(b == alphabet.get(a, a) for a, b in pairs)


def test_scripts_differ_and_the_seed_decides() -> None:
    def scripts_of(seed: int) -> list[int]:
        texts = [TOKENIZER.decode(piece) for piece in added(0.3, seed)]
        return [min(ord(c) for c in text if ord(c) >= FIRST) for text in texts]

    first = scripts_of(1)
    assert len(set(first)) > 0.7 * len(first) > 7
    assert scripts_of(1) == first
    assert scripts_of(-2) != first


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=9),
    share=st.floats(0, 1),
)
def test_any_stream(documents: list[list[int]], share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invented_scripts, "PIECE", 5)
        pieces = added(share, whole=dataset_of(documents))
    assert len(pieces) == round(share * sum(map(len, documents)) / 5)
    for piece in pieces:
        assert 1 <= len(piece) <= 5
        assert piece.tolist().index(TOKENIZER.eos_id) == len(piece) - 1


@pytest.mark.parametrize("reason", ["no share", "long", "words"])
def test_where_there_are_none(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, share = WHOLE, 0.5
    if reason == "no share":
        share = 0.0
    elif reason == "long":
        monkeypatch.setattr(invented_scripts, "MOST_TOKENS", len(WHOLE.train) - 1)
    else:
        write_jsonl(tmp_path / "text.jsonl", TEXTS)
        data = DataConfig(data=str(tmp_path / "text.jsonl"), tokenizer="word", vocab_size=50)
        dataset = prepare(data, progress=False)
        assert len(dataset.train) > 3 * PIECE
    assert with_invented_scripts(dataset, share, 0) is dataset


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_the_share_is_a_share(share: float) -> None:
    with pytest.raises(InputError, match="it is a share, between 0 and 1"):
        TrainConfig(invented_scripts=share)
