"""Rank files against tiktoken, GPT-2's files against tokenizers, and what is refused."""

import base64
import json
import pickle
import random
import re

import numpy as np
import pytest
import tiktoken
import tokenizers
from bpe_texts import FRAGMENTS, PUBLISHED, awkward, prose
from fuzz_files import fuzz
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer, bpe_reference
from tinylm.tokenizer.bpe_json import BYTE_TO_CHAR, EOS, BPEVocabulary, to_alphabet
from tinylm.tokenizer.split_patterns import PATTERNS

SPECIAL = {EOS: 800, "<|fim|>": 803}  # 801 and 802 are not used


def reference_of(tokenizer):
    vocabulary = tokenizer._vocabulary
    return bpe_reference.BPEModel(
        tokens=vocabulary.tokens(),
        merges=vocabulary.merges,
        byte_ids=vocabulary.byte_ids(),
        special_ids=vocabulary.special_ids,
        ignore_merges=vocabulary.ignore_merges,
        ranks_are_ids=vocabulary.ranks_are_ids,
        add_prefix_space=vocabulary.add_prefix_space,
        pattern=vocabulary.pattern,
    )


def write_ranks(path, ranks):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines), encoding="ascii")
    return path


def read_ranks(path):
    """As tiktoken.load, which would keep the file's content beyond the test, by its name."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def ranks_of(tokenizer):
    tokens = tokenizer._vocabulary.tokens()
    return {token: i for i, token in enumerate(tokens) if i != tokenizer.eos_id}


def both(path, ranks, pattern="gpt2", special_tokens=SPECIAL):
    """Our reading of a rank file with these ranks, and tiktoken's."""
    ours = BPETokenizer.load_tiktoken(
        write_ranks(path, ranks), pattern=pattern, special_tokens=special_tokens
    )
    theirs = tiktoken.Encoding(
        "test", pat_str=PUBLISHED[pattern], mergeable_ranks=ranks, special_tokens=special_tokens
    )
    return ours, theirs


# tiktoken


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request, tmp_path_factory):
    texts = [prose(1), " ".join(FRAGMENTS) * 3]
    trained = BPETokenizer.train(texts, vocab_size=700, pattern=request.param)
    path = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    return *both(path, ranks_of(trained), request.param), path.with_name("tokenizer.json")


@given(text=awkward)
@settings(max_examples=300)
def test_ids_of_rank_files_are_those_of_tiktoken(pair, text):
    ours, theirs, _ = pair
    expected = theirs.encode_ordinary(text)
    assert ours.encode(text) == expected
    assert reference_of(ours).encode(text, replace=False) == expected
    assert ours.decode(expected) == text


def test_rank_files_of_ranks_are_written_as_they_were_read(pair, tmp_path):
    ours, theirs, _ = pair
    ours.save_tiktoken(tmp_path / "again.tiktoken")
    assert read_ranks(tmp_path / "again.tiktoken") == theirs._mergeable_ranks
    assert ours.vocab_size == theirs.n_vocab
    assert ours.eos_id == theirs.eot_token


@given(text=awkward)
@settings(max_examples=150)
def test_ranks_saved_as_merges_give_the_same_ids(pair, text):
    assume(EOS not in text)  # As a whole piece, tokenizers would look it up among all tokens.
    ours, _, path = pair
    if not path.exists():
        ours.save(path)
    loaded = BPETokenizer.load(path)
    other = tokenizers.Tokenizer.from_file(str(path))
    other.encode_special_tokens = True
    assert loaded.vocab == ours.vocab
    assert loaded.vocab_size == ours.vocab_size
    assert loaded.encode(text) == ours.encode(text)
    assert other.encode(text, add_special_tokens=False).ids == ours.encode(text)


@given(text=awkward)
@settings(max_examples=100)
def test_trained_tokenizers_saved_as_ranks_give_the_same_ids(tmp_path_factory, text):
    trained = BPETokenizer.train([prose(2), " ".join(FRAGMENTS) * 3], vocab_size=600)
    path = tmp_path_factory.mktemp("saved") / "ranks.tiktoken"
    trained.save_tiktoken(path)
    theirs = tiktoken.Encoding(
        "test",
        pat_str=PUBLISHED["gpt2"],
        mergeable_ranks=read_ranks(path),
        special_tokens={EOS: 0},
    )
    loaded = BPETokenizer.load_tiktoken(path, pattern="gpt2", special_tokens={EOS: 0})
    assert trained.encode(text) == theirs.encode_ordinary(text) == loaded.encode(text)


def odd_ranks(seed, size=60):
    """Tokens that no training would give, in an order that none would: parts after the whole,
    several ways to one token, tokens that cannot be reached."""
    rng = random.Random(seed)
    tokens = {"".join(rng.choices("ab", k=rng.randint(2, 7))).encode() for _ in range(size)}
    tokens = [bytes([byte]) for byte in range(256)] + sorted(tokens)
    rng.shuffle(tokens)
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("seed", range(30))
def test_odd_ranks_are_merged_as_by_tiktoken(seed, tmp_path):
    ranks = odd_ranks(seed)
    ours, theirs = both(tmp_path / "odd.tiktoken", ranks, special_tokens={EOS: len(ranks)})
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab", k=rng.randint(1, 400))) for _ in range(40)]
    texts += ["a" * 700, "ab" * 300]
    expected = [theirs.encode_ordinary(text) for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    reference = reference_of(ours)
    assert [reference.encode(text, replace=False) for text in texts] == expected
    # Merges give the same ids or are refused.
    try:
        ours.save(tmp_path / "tokenizer.json")
    except InputError as error:
        assert "no list of merges gives the ids" in str(error)  # noqa: PT017
    else:
        loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
        assert [loaded.encode(text) for text in texts] == expected


def test_ids_that_are_not_used_cannot_be_decoded(pair):
    ours, theirs, _ = pair
    assert ours.vocab_size == 804
    assert len(ours.vocab) == len(theirs._mergeable_ranks) + 2
    assert ours.decode([803, 800]) == f"<|fim|>{EOS}"
    for unused in (0, 801, 802):
        with pytest.raises(InputError, match=f"id {unused} at position 1 is not in the vocabulary"):
            ours.decode([803, unused])
        with pytest.raises(InputError, match=f"id {unused} is not in the vocabulary"):
            ours.id_to_token(unused)
        with pytest.raises(InputError, match=f"id {unused} is not in the vocabulary"):
            ours.stream_decoder().push(unused)
        with pytest.raises(IndexError, match=f"id {unused} at position 0"):
            reference_of(ours).decode([unused])


def test_pickling_keeps_ranks(pair):
    ours, theirs, _ = pair
    assert pickle.loads(pickle.dumps(ours)).encode(prose(9)) == theirs.encode_ordinary(prose(9))


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("YWI=", "line 257: 'YWI=' is not a token in base64 and a rank"),
        ("YWI= 256 7", "line 257: 'YWI= 256 7' is not"),
        ("YW$I= 256", "line 257: 'YW$I= 256' is not"),
        ("YWI= x", "line 257: 'YWI= x' is not"),
        ("\nYWI= -1", "line 258: the token is empty or its rank, -1, is no id"),
        ("YWI= 2147483648", "line 257: the token is empty or its rank, 2147483648, is no id"),
        ("YWI= 256\nYWI= 257", "line 258: the token b'ab' has the rank 256 already"),
        ("YWI= 97", "line 257: the rank 97 is that of line 98 too"),
        ("YWI= 9999", "has no token with id 256, though the highest id is 9999"),
        ("\xff" * 50 + " 1", "is not a token in base64 and a rank"),
    ],
)
def test_a_broken_rank_file_names_the_line(tmp_path, extra, message):
    path = write_ranks(tmp_path / "broken.tiktoken", BYTES)
    path.write_bytes(path.read_bytes() + extra.encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        BPETokenizer.load_tiktoken(path, pattern="gpt2", special_tokens={EOS: 300})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"special_tokens": {}}, "special_tokens have no <|endoftext|> (they are: none)"),
        ({"eos_token": "</s>"}, "special_tokens have no </s> (they are: <|endoftext|>)"),
        ({"special_tokens": {EOS: 97}}, "the id of the special token '<|endoftext|>', 97, is that"),
        ({"special_tokens": {EOS: -1}}, "-1, is no id"),
        ({"special_tokens": {EOS: 257, "": 258}}, "the special token '' is empty"),
        ({"special_tokens": {EOS: 257, "ab": 258}}, "the special token 'ab' is empty or a token"),
        ({"special_tokens": {EOS: 257, "x y": 257}}, "257, is that of '<|endoftext|>' too"),
        ({"pattern": "cl100k_base"}, "pattern is 'cl100k_base'; it must be one of"),
    ],
)
def test_arguments_that_do_not_fit_a_rank_file(tmp_path, options, message):
    path = write_ranks(tmp_path / "ranks.tiktoken", BYTES | {b"ab": 256})
    options = {"pattern": "gpt2", "special_tokens": {EOS: 257}} | options
    with pytest.raises(InputError, match=re.escape(message)):
        BPETokenizer.load_tiktoken(path, **options)


def test_a_rank_file_without_some_byte_or_without_a_file(tmp_path):
    ranks = {token: rank for token, rank in BYTES.items() if token != b"\x80"}
    path = write_ranks(tmp_path / "ranks.tiktoken", ranks)
    for name, message in ((path, "no token for the byte 0x80"), ("none", "cannot read none: No")):
        with pytest.raises(InputError, match=message):
            BPETokenizer.load_tiktoken(name, pattern="gpt2", special_tokens={EOS: 256})


def tokenizer_of(merges, **options):
    """A tokenizer with these merges of names, and ids in their order."""
    names = [*BYTE_TO_CHAR, *dict.fromkeys(left + right for left, right in merges), EOS]
    rows = [[names.index(left), names.index(right), names.index(left + right)]
            for left, right in merges]  # fmt: skip
    return BPETokenizer(
        BPEVocabulary(
            names=names,
            merges=np.array(rows, dtype=np.uint32).reshape(-1, 3),
            special_ids=[len(names) - 1],
            eos_id=len(names) - 1,
            **options,
        )
    )


def test_what_ranks_cannot_say_is_refused(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    # bc goes first, so that ab and then c are never side by side.
    unreachable = tokenizer_of([("b", "c"), ("a", "b"), ("ab", "c")])
    with pytest.raises(InputError, match="'abc' cannot be in a rank file: no merges lead to it"):
        unreachable.save_tiktoken(path)
    vocabulary = tokenizer_of([("b", "c"), ("x", "y")])._vocabulary
    object.__setattr__(vocabulary, "merges", vocabulary.merges[::-1].copy())
    with pytest.raises(InputError, match="its id is not in the order of the merges"):
        BPETokenizer(vocabulary).save_tiktoken(path)
    with pytest.raises(InputError, match="a space is put before a text"):
        tokenizer_of([("a", "b")], add_prefix_space=True).save_tiktoken(path)
    assert not path.exists()


# GPT-2


@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])
def test_gpt2s_files_are_read_by_tokenizers_and_read_again(tmp_path, pattern):
    trained = BPETokenizer.train([prose(4)], vocab_size=500, pattern=pattern)
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    trained.save_gpt2(*files)
    loaded = BPETokenizer.load_gpt2(*files, pattern=pattern)
    assert loaded.vocab == trained.vocab
    assert loaded.encode(prose(5)) == trained.encode(prose(5))
    assert loaded.decode([loaded.eos_id]) == EOS
    if pattern == "gpt2":
        other = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert other.encode(prose(5)).ids == trained.encode(prose(5))


def test_gpt2s_files_of_tokenizers_are_read(tmp_path):
    trained = BPETokenizer.train([prose(4)], vocab_size=500)
    trained.save(tmp_path / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.model.save(str(tmp_path))
    loaded = BPETokenizer.load_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert loaded.vocab == trained.vocab
    assert loaded.encode(prose(5)) == trained.encode(prose(5))


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (b"ab", "line 3: 'ab' is not two tokens"),
        (b"a b c", "line 3: 'a b c' is not two tokens"),
        (b"a \xff", "line 3: 'a \\\\xff' is not two tokens"),
        (b"a c", "line 3: of 'a' 'c', 'ac' is not in the vocabulary"),
        (b"<|endoftext|> b", "'<|endoftext|>' is special"),
    ],
)
def test_a_broken_merge_names_the_line(tmp_path, merge, message):
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    tokenizer_of([("a", "b")]).save_gpt2(*files)
    files[1].write_bytes(files[1].read_bytes() + merge + b"\r\n")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        BPETokenizer.load_gpt2(*files)
    assert str(files[1]) in str(caught.value)


def test_what_is_wrong_with_gpt2s_files(tmp_path):
    files = vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    with pytest.raises(InputError, match=r"cannot read .*vocab\.json"):
        BPETokenizer.load_gpt2(*files)
    tokenizer_of([("a", "b")]).save_gpt2(*files)
    with pytest.raises(InputError, match=r"vocab\.json has no token '<s>', said to be special"):
        BPETokenizer.load_gpt2(*files, special_tokens=[EOS, "<s>"])
    with pytest.raises(InputError, match="no special token <s>"):
        BPETokenizer.load_gpt2(*files, eos_token="<s>")
    merges.unlink()
    with pytest.raises(InputError, match=r"cannot read .*merges\.txt"):
        BPETokenizer.load_gpt2(*files)
    vocab.write_text("[1", encoding="utf-8")
    with pytest.raises(InputError, match=r"is not JSON: .* line 1"):
        BPETokenizer.load_gpt2(*files)
    vocab.write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match="is not a JSON object of tokens and ids"):
        BPETokenizer.load_gpt2(*files)


def test_what_gpt2s_files_cannot_say_is_refused(tmp_path):
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    unreachable = tokenizer_of([("b", "c"), ("a", "b"), ("ab", "c")], ignore_merges=True)
    assert unreachable.encode("abc") == [unreachable.vocab["abc"]]
    with pytest.raises(InputError, match="no merges lead to the token 'abc'"):
        unreachable.save_gpt2(*files)
    with pytest.raises(InputError, match="a space is put before a text"):
        tokenizer_of([("a", "b")], add_prefix_space=True).save_gpt2(*files)


@given(token=st.binary(min_size=1, max_size=8))
def test_spelling_is_one_to_one(token):
    assert bytes(BYTE_TO_CHAR.index(char) for char in to_alphabet(token)) == token


def test_vocab_json_is_plain_json(tmp_path):
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    tokenizer_of([("a", "b")]).save_gpt2(*files)
    assert json.loads(files[0].read_text(encoding="utf-8"))["ab"] == 256
    assert files[1].read_text(encoding="utf-8") == "#version: 0.2\na b\n"


def test_broken_files_load_or_are_refused(tmp_path):
    """Some of what tests/fuzz_files.py does for as long as it is told."""
    counts = fuzz(random.Random(0), lambda count: count < 150, tmp_path)
    assert {kind for kind, count in counts.items() if count} >= {"json loaded", "json refused"}


def test_special_tokens_that_cannot_be_encoded_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(["a"], 258, special_tokens=[EOS, "<pad>"]).save(path)
    path.write_text(path.read_text("utf-8").replace("<pad>", "\\ud800"), "utf-8")
    with pytest.raises(InputError, match=r"special token '\\ud800', which no text could have"):
        BPETokenizer.load(path)
    with pytest.raises(InputError, match=r"special token '\\ud800' has a lone surrogate"):
        both(
            tmp_path / "ranks",
            {bytes([i]): i for i in range(256)},
            "gpt2",
            {EOS: 256, "\ud800": 257},
        )
