"""Special tokens in text against tiktoken, and the places of tokens against tokenizers."""

import re

import numpy as np
import pytest
import tiktoken
import tokenizers
from bpe_texts import FRAGMENTS, PUBLISHED, awkward, prose
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS

NAMES = [EOS, "<|a|>", "<|b|>", "é😀"]
with_names = st.lists(st.one_of(st.sampled_from([*NAMES, "<|", "|>", " "]), awkward)).map("".join)
choices = st.one_of(st.just("all"), st.sets(st.sampled_from(NAMES)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer with four special tokens, and tiktoken's of the same."""
    path = tmp_path_factory.mktemp("special") / "ranks.tiktoken"
    trained = BPETokenizer.train([prose(0), " ".join(FRAGMENTS)], vocab_size=600, pattern="cl100k")
    trained.save_tiktoken(path)
    special_tokens = {name: 600 + i for i, name in enumerate(NAMES)}
    ours = BPETokenizer.load_tiktoken(path, pattern="cl100k", special_tokens=special_tokens)
    tokens = enumerate(ours._vocabulary.tokens())
    theirs = tiktoken.Encoding(
        "test",
        pat_str=PUBLISHED["cl100k"],
        mergeable_ranks={token: i for i, token in tokens if token and i < 600},
        special_tokens=special_tokens,
    )
    return ours, theirs


@given(text=with_names, allowed=choices, disallowed=choices)
@settings(max_examples=500)
def test_special_tokens_are_decided_as_by_tiktoken(pair, text, allowed, disallowed):
    ours, theirs = pair
    options = {"allowed_special": allowed, "disallowed_special": disallowed}
    try:
        expected = theirs.encode(text, **options)
    except ValueError:
        with pytest.raises(InputError, match="which disallowed_special forbids"):
            ours.encode(text, **options)
    else:
        assert ours.encode(text, **options) == expected
        assert ours.decode(expected) == text


@given(
    texts=st.lists(with_names, max_size=5),
    allowed=choices,
    disallowed=st.sampled_from([(), ["<|b|>"]]),
    add_eos=st.booleans(),
)
@settings(max_examples=200)
def test_batches_decide_as_single_texts(pair, texts, allowed, disallowed, add_eos):
    ours, _ = pair
    options = {"allowed_special": allowed, "disallowed_special": disallowed}
    refused = [i for i, text in enumerate(texts) if disallowed and "<|b|>" in text]
    if refused:
        with pytest.raises(
            InputError, match=rf"^text {refused[0]} has the special token '<\|b\|>'"
        ):
            ours.encode_batch(texts, **options)
        return
    ids, offsets = ours.encode_batch(texts, add_eos, threads=2, **options)
    plain, plain_offsets = ours.encode_batch(texts, add_eos)
    assert (ids.dtype, offsets.dtype) == (plain.dtype, plain_offsets.dtype)
    expected = [ours.encode(text, add_eos, **options) for text in texts]
    assert ids.tolist() == [i for row in expected for i in row]
    assert np.diff(offsets).tolist() == list(map(len, expected))


def test_surrogates_beside_special_tokens_are_refused_or_replaced(pair):
    ours, _ = pair
    texts, options = ["fine", f"a{EOS}\ud800"], {"allowed_special": "all"}
    with pytest.raises(InputError, match=r"text 1 has the lone surrogate \\ud800 at position 14"):
        ours.encode_batch(texts, **options)
    ids, offsets = ours.encode_batch(texts, errors="replace", **options)
    assert ours.decode(ids[offsets[1] :]) == f"a{EOS}\ufffd"


@given(text=with_names)
@settings(max_examples=100)
def test_no_text_becomes_a_special_token_unless_allowed(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert not set(ours.encode(text)) & set(range(600, 604))


def test_the_longest_special_token_wins(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    BPETokenizer.train(["x"], vocab_size=257).save_tiktoken(path)
    special_tokens = {EOS: 0, "<s": 257, "<s>": 258, "<s>>": 259}
    tokenizer = BPETokenizer.load_tiktoken(path, pattern="gpt2", special_tokens=special_tokens)
    assert tokenizer.encode("<s>><s><s", allowed_special="all") == [259, 258, 257]
    assert tokenizer.encode("<s>>", allowed_special={"<s"})[0] == 257
    assert tokenizer.encode("<s>", add_eos=True, allowed_special=["<s>"]) == [258, 0]


def test_a_refused_text_says_which_token_and_where(pair):
    ours, _ = pair
    with pytest.raises(InputError, match=re.escape("special token '<|a|>' at position 3, which")):
        ours.encode("xé <|a|>", disallowed_special="all")
    assert ours.encode("<|a|>", allowed_special="all", disallowed_special="all") == [601]


def test_bad_choices(pair):
    ours, _ = pair
    with pytest.raises(InputError, match="allowed_special is 'none'; it must be 'all' or a set"):
        ours.encode("x", allowed_special="none")
    with pytest.raises(InputError, match="disallowed_special has '<x>', which is no special"):
        ours.encode("x", disallowed_special={"<x>"})
    with pytest.raises(InputError, match="unit is 'words'; it must be 'characters' or 'bytes'"):
        ours.encode_with_offsets("x", unit="words")


def test_lone_surrogates_have_the_position_in_the_whole_text(pair):
    ours, _ = pair
    text = f"{EOS} \ud800"
    for encode in (ours.encode, ours.encode_with_offsets):
        with pytest.raises(InputError, match=r"lone surrogate .* at position 14"):
            encode(text, allowed_special="all")
    replaced = ours.encode(text, errors="replace", allowed_special="all")
    assert replaced == ours.encode(f"{EOS} \ufffd", allowed_special="all")
    ids, spans = ours.encode_with_offsets(text, errors="replace", allowed_special="all")
    assert ids == replaced
    assert spans[-1].tolist()[1] == 15


# Offsets


@given(text=with_names, allowed=choices)
@settings(max_examples=300)
def test_bytes_between_offsets_are_the_tokens(pair, text, allowed):
    ours, _ = pair
    ids, spans = ours.encode_with_offsets(text, "bytes", allowed_special=allowed)
    assert ids == ours.encode(text, allowed_special=allowed)
    assert spans.shape == (len(ids), 2)
    assert spans.dtype == np.int64
    pieces = [text.encode()[start:end] for start, end in spans.tolist()]
    assert pieces == [ours.decode_bytes([i]) for i in ids]
    assert spans[1:, 0].tolist() == spans[:-1, 1].tolist()


@given(text=awkward)
@settings(max_examples=300)
def test_characters_are_those_of_tokenizers(pair, text, tmp_path_factory):
    ours, _ = pair
    path = tmp_path_factory.mktemp("offsets") / "tokenizer.json"
    ours.save(path)
    other = tokenizers.Tokenizer.from_file(str(path))
    other.encode_special_tokens = True
    ids, spans = ours.encode_with_offsets(text)
    encoded = other.encode(text, add_special_tokens=False)
    assert ids == encoded.ids
    assert list(map(tuple, spans.tolist())) == encoded.offsets


def test_tokens_of_one_character_share_it(pair):
    ours, _ = pair
    ids, spans = ours.encode_with_offsets("a\U000e0041b")
    assert len(ids) == 6
    assert spans.tolist() == [[0, 1], *[[1, 2]] * 4, [2, 3]]
    assert ours.encode_with_offsets("a\U000e0041b", "bytes")[1][:, 0].tolist() == list(range(6))


def test_special_tokens_have_places_too(pair):
    ours, _ = pair
    ids, spans = ours.encode_with_offsets(f"é{EOS}x", allowed_special="all")
    assert ids[-2] == ours.eos_id
    assert spans[-2:].tolist() == [[1, 14], [14, 15]]


def test_a_space_put_before_the_text_takes_no_place(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(["a hello hello"], vocab_size=262).save(path)
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    tokenizer = BPETokenizer.load(path)
    ids, spans = tokenizer.encode_with_offsets(f"hello{EOS}hello", "bytes", allowed_special="all")
    assert [tokenizer.id_to_token(i) for i in ids] == ["Ġhello", EOS, "Ġhello"]
    assert spans.tolist() == [[0, 5], [5, 18], [18, 23]]
    ids, spans = tokenizer.encode_with_offsets("zé")
    assert [tokenizer.id_to_token(i) for i in ids] == ["Ġ", "z", "Ã", "©"]
    assert spans.tolist() == [[0, 0], [0, 1], [1, 2], [1, 2]]


def test_an_empty_text_has_no_offsets(pair):
    ours, _ = pair
    ids, spans = ours.encode_with_offsets("")
    assert ids == []
    assert spans.shape == (0, 2)
