"""The byte model against a plain one, and as a distribution."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.errors import InputError
from tinylm.spelling import _START, END, ORDER, SYMBOLS, SpellingModel

Words = dict[str, int]
WORDS: Words = {"banana": 5, "bandana": 2, "ban": 7, "naïve": 1, "東京": 3}
WORDS |= {"a": 1, "b\x00\xff": 4, "\ud800x": 2}


class Reference:
    """Witten-Bell interpolation as its formula says, on dictionaries."""

    def __init__(self, words: Words) -> None:
        self.counts: dict[tuple[int, ...], dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for word, count in words.items():
            for context, symbol in self.steps(word):
                for k in range(ORDER + 1):
                    self.counts[context[ORDER - k :]][symbol] += count

    @staticmethod
    def steps(word: str) -> list[tuple[tuple[int, ...], int]]:
        symbols = [_START] * ORDER + list(word.encode("utf-8", "surrogatepass")) + [END]
        return [(tuple(symbols[i - ORDER : i]), symbols[i]) for i in range(ORDER, len(symbols))]

    def p(self, symbol: int, context: tuple[int, ...]) -> float:
        shorter = self.p(symbol, context[1:]) if context else 1 / SYMBOLS
        if context not in self.counts:
            return shorter
        after = self.counts[context]
        n, t = sum(after.values()), len(after)
        return (after.get(symbol, 0) + t * shorter) / (n + t)

    def bits(self, word: str) -> float:
        return float(-sum(np.log2(self.p(symbol, context)) for context, symbol in self.steps(word)))


def fit(words: Words) -> SpellingModel:
    return SpellingModel.fit(list(words), list(words.values()))


NEW = ["", "band", "banan", "x", "zzz", "京東", "nan\x00", "\udfff"]


def test_bits_equal_the_reference() -> None:
    reference, words = Reference(WORDS), [*WORDS, *NEW]
    expected = [reference.bits(word) for word in words]
    np.testing.assert_allclose(fit(WORDS).bits(words), expected, rtol=1e-12)


@given(
    st.dictionaries(st.text("abé", max_size=7), st.integers(1, 9), max_size=12),
    st.lists(st.text("abéz", max_size=7), max_size=5),
)
def test_bits_equal_the_reference_on_any_words(words: Words, asked: list[str]) -> None:
    reference = Reference(words)
    expected = [reference.bits(word) for word in asked]
    np.testing.assert_allclose(fit(words).bits(asked), expected, rtol=1e-12)


@pytest.mark.parametrize("context", ["", "b", "ban", "bana", "anan", "zzzz", "\udc00", "東京"])
def test_probabilities_sum_to_one(context: str) -> None:
    symbols = [_START] * ORDER + list(context.encode("utf-8", "surrogatepass"))
    key = 0
    for symbol in symbols[-ORDER:]:
        key = key << 9 | symbol
    keys = np.array([key << 9 | symbol for symbol in range(SYMBOLS)], dtype=np.uint64)
    p = fit(WORDS)._probabilities(keys)
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_without_words_every_symbol_costs_the_same() -> None:
    bits = SpellingModel.fit([], []).bits(["", "abc"])
    np.testing.assert_allclose(bits, np.log2(SYMBOLS) * np.array([1, 4]))
    assert fit(WORDS).bits([]).shape == (0,)


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(WORDS).bits([*WORDS, *NEW])
    monkeypatch.setattr("tinylm.spelling._WORDS_AT_ONCE", 3)
    np.testing.assert_array_equal(fit(WORDS).bits([*WORDS, *NEW]), whole)


def test_counts_weigh() -> None:
    rare, common = (SpellingModel.fit(["ab", "cd"], [1, n]).bits(["cd"])[0] for n in (1, 50))
    assert common < rare - 1


def test_save_and_load(tmp_path: Path) -> None:
    model = fit(WORDS)
    path = tmp_path / "spelling.safetensors"
    model.save(path)
    loaded = SpellingModel.load(path)
    np.testing.assert_array_equal(loaded.bits([*WORDS, *NEW]), model.bits([*WORDS, *NEW]))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="not a readable spelling model"):
        SpellingModel.load(path)
    with pytest.raises(InputError, match="not a readable spelling model"):
        SpellingModel.load(tmp_path / "missing")
    SpellingModel.fit([], []).save(path)
    assert SpellingModel.load(path).bits(["a"])[0] == pytest.approx(2 * np.log2(SYMBOLS))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 words but 1 counts"):
        SpellingModel.fit(["a", "b"], [1])
