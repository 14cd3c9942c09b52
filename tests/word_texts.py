"""Texts to try word tokenizers on, and how the compiled one is compared with its specification."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st

from tinylm.tokenizer import word_reference as reference

_C = pytest.importorskip("tinylm._C")

SPACES = [chr(c) for c in range(0x110000) if chr(c).isspace()]
MARKS = list(".,!?;:\"'()")
# Sigmas; letters whose lower case is longer, shorter or ASCII; cased and case-ignorable marks;
# what looks like a space but is none; surrogates; characters of one to four bytes.
TRAPS = [
    *"ΣσςΑαAazZ1-_",
    *"İKÅẞȺȾǅßéÉЖ中𐐀😀",
    *"\u0345\u00ad\u200d\u0301·\u2019ʰⅧⓐ",
    *"\u180e\u200b\u2060\ufeff\x00\u201c\u2026",
    *"\ud800\udc00\udbff\udfff\U00010000",
    *MARKS,
]
trap_texts = st.text(alphabet=st.sampled_from([*TRAPS, *TRAPS, *SPACES]), max_size=60)
any_texts = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=40)
long_texts = st.lists(
    st.one_of(trap_texts, st.text(alphabet="abcXYZ .,", max_size=80), any_texts), max_size=12
).map("".join)
texts_lists = st.lists(st.one_of(trap_texts, any_texts, long_texts), max_size=8)


def each_instruction_set():
    """The names of those this processor has, each in use for its turn."""
    names = _C.instruction_sets()
    try:
        for name in names:
            _C.use_instruction_set(name)
            yield name
    finally:
        _C.use_instruction_set(names[-1])


def words(texts, threads=1, **options):
    """The words that the compiled counter finds, with their counts, by first appearance."""
    counter = _C.WordCounter()
    counter.add(texts, threads, **options)
    found, counts = counter.items()
    return dict(zip(found, counts.tolist(), strict=True))


def reference_words(texts):
    return dict(Counter(word for text in texts for word in reference.split_words(text)))


def assert_same(texts, threads=1, **options):
    """Compares words, their order, and ids in texts' order with the reference."""
    expected = reference_words(texts)
    vocab = {"<UNK>": 0, "<EOS>": 1} | {word: i + 2 for i, word in enumerate(expected)}
    dtypes = (np.uint16, np.int32, np.uint32) if len(vocab) <= 1 << 16 else (np.int32,)
    wanted, offsets = reference.WordEncoder(vocab).encode_batch(texts, True, np.dtype(np.int64))
    for name in each_instruction_set():
        found = words(texts, threads, **options)
        assert list(found.items()) == list(expected.items()), name
        for dtype in dtypes:
            ids, starts = _C.WordEncoder(vocab).encode_batch(
                texts, True, np.dtype(dtype), threads, **options
            )
            assert ids.dtype == dtype
            assert starts.dtype == np.int64
            np.testing.assert_array_equal(ids, wanted)
            np.testing.assert_array_equal(starts, offsets)
