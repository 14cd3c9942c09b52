"""Ids to text by the compiled decoder, next to joining words in Python."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_texts import _C, TRAPS

from tinylm.errors import InputError
from tinylm.tokenizer import WordTokenizer
from tinylm.tokenizer import word_reference as reference

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", ">u2", ">i4"]


@pytest.fixture(params=["c++", "python"])
def tokenizer(request, monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", request.param)
    return WordTokenizer(["a", "bc", "é", "中", "😀", "\ud800", "\udc00", "x" * 40, "я" * 15])


word_lists = st.lists(
    st.text(alphabet=st.sampled_from([*TRAPS, *"abcdefgh"]), max_size=20).map(
        lambda word: word.replace(" ", "")
    ),
    min_size=1, max_size=12,
)  # fmt: skip
id_lists = st.lists(
    st.one_of(st.integers(0, 11), st.integers(-(2**63), 2**63 - 1), st.integers(-1, 13)),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(word_lists, id_lists, st.integers(1, 3))
def test_any_words_and_ids(words, ids, threads):
    compiled, plain = _C.WordDecoder(words, 0), reference.WordDecoder(words, 0)
    want = " ".join(words[i] if 0 <= i < len(words) else words[0] for i in ids)
    for decoder in (compiled, plain):
        for form in (ids, np.array(ids, np.int64)):
            text = decoder.decode(form, threads)
            assert text == want
            assert hash(text) == hash(want)
            assert text.encode("utf-8", "surrogatepass") == want.encode("utf-8", "surrogatepass")
            assert text.isascii() == want.isascii()


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_array(tokenizer, dtype):
    ids = np.array([2, 3, 0, 99, 4, 1, 10], dtype)
    want = "a bc <UNK> <UNK> é <EOS> " + "я" * 15
    assert tokenizer.decode(ids) == want
    assert tokenizer.decode(np.repeat(ids, 3)[::3]) == want
    assert tokenizer.decode_batch(ids, np.array([0, 3, 3, 7])) == [
        "a bc <UNK>", "", "<UNK> é <EOS> " + "я" * 15,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "chosen", [[2, 3], [2, 4], [2, 5], [2, 6], [7, 8], [9, 2, 9], [10, 2], [5, 6, 9, 10, 2, 7]]
)
@pytest.mark.parametrize("repeats", [1, 2, 9, 40_000])
def test_every_width_of_characters(tokenizer, chosen, repeats):
    words = list(tokenizer.vocab)
    want = " ".join([words[i] for i in chosen] * repeats)
    ids = chosen * repeats
    for threads in (1, 2, None):
        assert tokenizer.decode(ids, threads=threads) == want
        assert tokenizer.decode(np.array(ids, np.uint16), threads=threads) == want


def test_what_ids_may_be(tokenizer):
    assert tokenizer.decode((2, np.int64(3), True)) == "a bc <EOS>"
    assert tokenizer.decode(range(2, 4)) == "a bc"
    assert tokenizer.decode([2, 10**30, -(10**30)]) == "a <UNK> <UNK>"
    assert tokenizer.decode(np.array([2**64 - 1, 2], np.uint64)) == "<UNK> a"
    for ids in ([2.0], ["a"], [None], np.array([2.0]), np.array([[2]]), 5, None):
        with pytest.raises(TypeError):
            tokenizer.decode(ids)
    with pytest.raises(InputError, match="threads is 0"):
        tokenizer.decode([2], threads=0)


def test_decoding_a_batch_is_decoding_each(tokenizer):
    texts = ["A bc é", "", "中 😀 no", "a " * 100_000]
    ids, offsets = tokenizer.encode_batch(texts)
    for threads in (None, 1, 3):
        got = tokenizer.decode_batch(ids, offsets, threads)
        assert got == [tokenizer.decode(ids[a:b]) for a, b in pairwise(offsets)]
    assert tokenizer.decode_batch(ids, offsets[:1]) == []


@pytest.mark.parametrize("offsets", [[0, 9], [2, 1], [-1, 2], [0, 2, 1]])
def test_offsets_that_cannot_be(tokenizer, offsets):
    with pytest.raises(InputError, match="offsets must rise from 0"):
        tokenizer.decode_batch(np.array([2, 3, 4], np.uint16), np.array(offsets))


def test_streaming_is_decoding(tokenizer):
    ids = [2, 4, 99, 5, 6, 7, 8, 9, 1]
    stream = tokenizer.stream_decoder()
    text = "".join([*(stream.push(i) for i in ids), stream.finish()])
    assert text == " " + tokenizer.decode(ids)
