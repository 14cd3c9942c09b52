"""What texts of BPE can be: UTF-8 in any buffer, and vocabularies and pieces of any size."""

import random
from itertools import product
from mmap import ACCESS_READ, mmap

import numpy as np
import pytest
from bpe_peers import merges_of
from bpe_texts import FRAGMENTS, awkward, prose
from hypothesis import given, settings

from tinylm.errors import InputError
from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import BYTE_TO_CHAR, EOS, BPEVocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([prose(0), " ".join(FRAGMENTS) * 3], vocab_size=500)


@given(text=awkward)
@settings(max_examples=50)
def test_utf8_in_any_buffer_is_its_text(tokenizer, text):
    data, expected = text.encode(), tokenizer.encode(text)
    for buffer in (data, bytearray(data), memoryview(data), memoryview((data + b" ") * 2)[::2]):
        if len(buffer) == len(data):
            assert tokenizer.encode(buffer) == expected
    assert tokenizer.encode_with_offsets(data)[0] == expected
    ids, _ = tokenizer.encode_batch([text, data, np.frombuffer(data, np.uint8)])
    assert ids.tolist() == expected * 3
    assert tokenizer.encode_batch(iter([data]))[0].tolist() == expected


def test_mapped_files_are_text(tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_text(prose(5), encoding="utf-8")
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        assert tokenizer.encode(mapped) == tokenizer.encode(prose(5))
        assert merges_of(BPETokenizer.train([mapped], 300)) == merges_of(
            BPETokenizer.train([prose(5)], 300)
        )
        with pytest.raises(InputError, match="texts is one mmap"):
            tokenizer.encode_batch(mapped)


@pytest.mark.parametrize("bad", [b"ok \xff", b"ok \xed\xa0\x80", b"ok \xe6\xbc"])
def test_bytes_that_are_no_utf8_are_refused_or_replaced(tokenizer, bad):
    with pytest.raises(InputError, match=r"the text is not valid UTF-8 at byte 3 \("):
        tokenizer.encode(bad)
    with pytest.raises(InputError, match=r"text 1 is not valid UTF-8 at byte 3 \("):
        tokenizer.encode_batch(["fine", bad])
    with pytest.raises(InputError, match=r"text 0 is not valid UTF-8 at byte 3 \("):
        BPETokenizer.train([bad])
    replaced = tokenizer.encode(bad.decode("utf-8", "replace"))
    assert tokenizer.encode(bad, errors="replace") == replaced
    assert tokenizer.encode_batch([bad], errors="replace")[0].tolist() == replaced


@pytest.mark.parametrize("bad", [None, 5, ["a"]])
def test_what_is_no_text_is_refused(tokenizer, bad):
    for function in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(
            InputError, match=r"the text is of type .* must be str, or bytes of UTF-8"
        ):
            function(bad)
    for function in (tokenizer.encode_batch, BPETokenizer.train, BPETokenizer.counter().add):
        with pytest.raises(InputError, match="text 1 is of type"):
            function(["a", bad])
    for function in (tokenizer.encode_batch, BPETokenizer.train, BPETokenizer.counter().add):
        with pytest.raises(InputError, match="texts is of type NoneType"):
            function(None)


@pytest.fixture(scope="module")
def large():
    """All pairs of bytes are tokens, so that ids take 32 bits."""
    pairs = list(product(range(1, 257), repeat=2))
    names = [EOS, *BYTE_TO_CHAR]
    names += [names[left] + names[right] for left, right in pairs]
    merges = np.array([(*pair, 257 + i) for i, pair in enumerate(pairs)], dtype=np.uint32)
    return BPETokenizer(BPEVocabulary(names=names, merges=merges, special_ids=[0], eos_id=0))


def test_large_vocabularies_have_int32_ids(large):
    ids, _ = large.encode_batch(["ÿÿab", "\x00"])
    assert ids.dtype == np.int32
    assert [large.id_to_token(i) for i in ids] == ["Ã", "¿Ã", "¿", "ab", "Ā"]
    assert large.decode(ids) == "ÿÿab\x00"


@pytest.mark.parametrize("wide", [False, True])
def test_pieces_of_many_ids_are_remembered_rightly(large, wide):
    """So many pieces of up to 31 ids that the list of those outgrows its bound."""
    tokenizer = large if wide else BPETokenizer.train(["x"], vocab_size=257)
    rng = random.Random(wide)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 40))) for _ in range(130_000)]
    texts = [" ".join(words[i : i + 1000]) for i in range(0, len(words), 1000)]
    ids, offsets = tokenizer.encode_batch(texts * 2, threads=1)
    half = int(offsets[len(texts)])
    assert (ids[:half] == ids[half:]).all()
    assert tokenizer.decode(ids[:half]) == "".join(texts)
    if not wide:
        assert half == sum(map(len, texts))
    for text, start, end in list(zip(texts, offsets, offsets[1:], strict=False))[::20]:
        alone = BPETokenizer(tokenizer._vocabulary).encode(text)  # nothing remembered
        assert ids[start:end].tolist() == alone
