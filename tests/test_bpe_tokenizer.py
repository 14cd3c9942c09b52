"""Byte-level BPE against Hugging Face tokenizers, the regex package and its own specification."""

import json
import multiprocessing
import os
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from bpe_peers import merges_of, train_in_hf
from bpe_texts import FRAGMENTS, awkward, prose
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tinylm.errors import InputError
from tinylm.tokenizer import bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS
from tinylm.tokenizer.split_patterns import PATTERNS, REGEX

C = compiled()
needs_extension = pytest.mark.skipif(C is None, reason="the compiled extension is not in use")


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


def load_in_hf(path):
    other = tokenizers.Tokenizer.from_file(str(path))
    other.encode_special_tokens = True  # a special token's name in a text is text
    return other


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([prose(0), " ".join(FRAGMENTS) * 3], vocab_size=500)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def hf(file):
    return load_in_hf(file)


# Encoding and decoding


@given(text=awkward)
@settings(max_examples=300)
def test_ids_are_those_of_tokenizers(tokenizer, hf, text):
    assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids


@given(text=awkward)
@settings(max_examples=200)
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == text.encode()
    assert tokenizer.decode_bytes(iter(ids)) == text.encode()


@given(text=awkward)
@settings(max_examples=200)
def test_ids_are_those_of_the_specification(tokenizer, text):
    assert tokenizer.encode(text) == reference_of(tokenizer).encode(text, replace=False)


@given(texts=st.lists(awkward, max_size=8), add_eos=st.booleans(), threads=st.sampled_from([1, 2]))
@settings(max_examples=100)
def test_a_batch_is_its_texts(tokenizer, texts, add_eos, threads):
    ids, offsets = tokenizer.encode_batch(texts, add_eos=add_eos, threads=threads)
    parts = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert parts == [tokenizer.encode(text, add_eos=add_eos) for text in texts]
    assert ids.dtype == np.uint16
    assert offsets.dtype == np.int64


def test_threads_share_large_batches_without_changing_the_ids(tokenizer):
    texts = [prose(seed, size=20_000) for seed in range(12)]
    one, two = (tokenizer.encode_batch(texts, True, threads) for threads in (1, 2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert one[0][one[1][1:] - 1].tolist() == [tokenizer.eos_id] * 12


def test_one_tokenizer_serves_many_threads_at_once(tokenizer):
    texts = [prose(seed, size=500) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(t) for t in texts]


@pytest.mark.parametrize("unit", ["a", " ", "\n", "1", "!", "é", "漢", "ab", "'s", "aab", "😀"])
def test_long_runs_have_the_ids_of_tokenizers(tokenizer, hf, unit):
    for length in (1, 2, 15, 23, 24, 47, 48, 49, 50, 1000):
        text = unit * length
        assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids


@needs_extension
@given(text=st.text(alphabet="abc", min_size=49, max_size=300), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_short_and_long_pieces_merge_alike_even_with_odd_merges(text, seed):
    """Ranks in random order: merging all of one pair at once would differ from the rule."""
    tokenizer = with_shuffled_merges(seed)
    expected = reference_of(tokenizer).encode(text, replace=False)
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode(text[:30]) == reference_of(tokenizer).encode(text[:30], replace=False)


def with_shuffled_merges(seed):
    trained = BPETokenizer.train(["abcabbaccabacbbacbcabcacbab " * 20], vocab_size=300)
    vocabulary = trained._vocabulary
    rows = vocabulary.merges.tolist()
    random.Random(seed).shuffle(rows)
    object.__setattr__(vocabulary, "merges", np.array(rows, dtype=np.uint32))
    return BPETokenizer(vocabulary)


def test_special_tokens_never_come_from_text(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b", add_eos=True)
    assert tokenizer.eos_id == 0
    assert ids.count(0) == 1
    assert ids[-1] == 0
    assert tokenizer.decode(ids) == f"a{EOS}b{EOS}"


def test_empty_inputs(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    ids, offsets = tokenizer.encode_batch([])
    assert ids.tolist() == []
    assert offsets.tolist() == [0]
    ids, offsets = tokenizer.encode_batch(["", ""], add_eos=True)
    assert ids.tolist() == [0, 0]
    assert offsets.tolist() == [0, 1, 2]


@given(text=awkward, cut=st.integers(0, 30))
@settings(max_examples=100)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text, cut):
    ids = tokenizer.encode(text)[cut:]
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in ids]
    if cut == 0:
        assert "".join(pieces) == text
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_streaming_holds_back_incomplete_characters():
    bytes_only = BPETokenizer.train(["x"], vocab_size=257)
    ids = bytes_only.encode("é😀")
    decoder = bytes_only.stream_decoder()
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "", "😀"]
    assert decoder.finish() == ""
    assert decoder.push(ids[0]) == ""
    assert decoder.finish() == "\ufffd"


# Files


@pytest.fixture(scope="module", params=PATTERNS)
def of_each_pattern(request, tmp_path_factory):
    """A tokenizer, and tokenizers' reading of its file."""
    texts = [prose(1), " ".join(FRAGMENTS) * 3]
    trained = BPETokenizer.train(texts, vocab_size=700, pattern=request.param)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    trained.save(path)
    assert BPETokenizer.load(path)._vocabulary.pattern == request.param
    return BPETokenizer.load(path), load_in_hf(path)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=3)
def test_threads_share_long_texts_without_changing_the_ids(of_each_pattern, seed):
    tokenizer, _ = of_each_pattern
    text = "".join(random.Random(seed).choices(FRAGMENTS, k=400_000))
    expected = tokenizer.encode(text)
    for threads, again in ((1, text), (3, text), (3, text.encode())):
        ids, offsets = tokenizer.encode_batch(["", text, again], True, threads)
        assert offsets.tolist() == [0, 1, len(expected) + 2, 2 * len(expected) + 3]
        assert ids.tolist() == [0, *expected, 0, *expected, 0]


@given(text=awkward)
@settings(max_examples=200)
def test_ids_of_each_pattern_are_those_of_tokenizers(of_each_pattern, text):
    ours, theirs = of_each_pattern
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert reference_of(ours).encode(text, replace=False) == expected
    assert ours.decode(expected) == text


def test_a_split_that_keeps_its_matches_is_the_same_as_one_that_isolates_them(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train([prose(1)], 300, pattern="o200k").save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = BPETokenizer.load(path), load_in_hf(path)
    text = prose(2)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def change(**paths):
    """A function that sets values in a nested object; keys are paths joined by two underscores."""

    def apply(content):
        for path, value in paths.items():
            *parents, last = path.split("__")
            target = content
            for key in parents:
                target = target[key]
            target[last] = value

    return apply


def split_step(**changes):
    return {
        "type": "Split",
        "pattern": {"Regex": REGEX["cl100k"]},
        "behavior": "Isolated",
        "invert": False,
    } | changes


def sequence(*steps):
    return change(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


UNSPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def test_saving_and_loading_change_nothing(tokenizer, file, tmp_path):
    loaded = BPETokenizer.load(file)
    assert loaded.vocab == tokenizer.vocab
    assert merges_of(loaded) == merges_of(tokenizer)
    assert loaded.encode(prose(3)) == tokenizer.encode(prose(3))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_files_of_tokenizers_load(tmp_path, ignore_merges, add_prefix_space):
    other = train_in_hf([prose(5)], 500, ignore_merges=ignore_merges)
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    path = tmp_path / "tokenizer.json"
    content = json.loads(other.to_str())
    # A token that no merge leads to is found only with ignore_merges.
    extra_id = len(content["model"]["vocab"])
    content["model"]["vocab"]["Ġzqzq"] = extra_id
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = BPETokenizer.load(path), load_in_hf(path)
    for text in ("", " ", "a", " zqzq", "x zqzq", prose(6), "\nzqzq", "zqzq" * 20):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        assert reference_of(ours).encode(text, replace=False) == expected
    assert (extra_id in ours.encode("x zqzq")) == ignore_merges


def test_merges_as_pairs_and_as_strings_load_alike(file, tmp_path):
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert merges_of(BPETokenizer.load(path)) == merges_of(BPETokenizer.load(file))


def test_a_special_token_at_the_end_is_the_eos(tmp_path):
    other = train_in_hf([prose(5)], 400)
    other.add_special_tokens(["<|im_end|>"])
    path = tmp_path / "tokenizer.json"
    other.save(str(path))
    loaded = BPETokenizer.load(path, eos_token="<|im_end|>")
    assert loaded.eos_id == loaded.vocab_size - 1 == other.token_to_id("<|im_end|>")
    assert loaded.decode([loaded.eos_id]) == "<|im_end|>"


def rename_token(old, new):
    def apply(content):
        vocab = content["model"]["vocab"]
        vocab[new] = vocab.pop(old)

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(normalizer={"type": "NFC"}), 'normalizer "NFC", which is not supported'),
        (change(truncation={"max_length": 4}), "truncation"),
        (change(padding={"strategy": "BatchLongest"}), "padding"),
        (change(pre_tokenizer={"type": "Metaspace"}), 'pre_tokenizer "Metaspace"'),
        (change(pre_tokenizer=None), "pre_tokenizer null"),
        (change(pre_tokenizer__use_regex=False), "use_regex false"),
        (sequence(UNSPLIT), "pre_tokenizer Sequence of ByteLevel, which is not supported"),
        (sequence({"type": "Digits"}, UNSPLIT), "pre_tokenizer Sequence of Digits and ByteLevel"),
        (sequence(split_step(), UNSPLIT | {"use_regex": True}), "use_regex true: not supported"),
        (sequence(split_step(), UNSPLIT | {"add_prefix_space": True}), "add_prefix_space true"),
        (sequence(split_step(behavior="Removed"), UNSPLIT), "pre_tokenizer Split with Removed"),
        (sequence(split_step(invert=True), UNSPLIT), "pre_tokenizer Split with Isolated"),
        (sequence(split_step(pattern={"Regex": "x+"}), UNSPLIT), 'the pattern {"Regex": "x+"}'),
        (sequence(split_step(pattern={"String": " "}), UNSPLIT), 'the pattern {"String": " "}'),
        (sequence(split_step(pattern=" "), UNSPLIT), "the pattern of Split is not a JSON object"),
        (change(decoder={"type": "Fuse"}), 'decoder "Fuse"'),
        (change(post_processor={"type": "TemplateProcessing"}), "TemplateProcessing"),
        (change(model__type="WordPiece"), 'model "WordPiece"'),
        (change(model__dropout=0.1), "model.dropout 0.1"),
        (change(model__end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (change(model__vocab=[]), "model.vocab is not a JSON object"),
        (change(model__merges=None), "model.merges is not a JSON array"),
        (change(model__merges=["a b", "nospace"]), "broken merge 1, 'a' 'b': 'ab' is not in"),
        (change(model__merges=["nospace"]), 'broken merge 1: "nospace" is not two tokens'),
        (change(model__merges=[["a", 1]]), "broken merge 1"),
        (change(model__vocab__zz=9999), "has no token with id 500, though the highest id is 9999"),
        (change(model__vocab__zz=5), "one id: 5"),
        (change(model__vocab__zz=-1), "gives the token 'zz' the id -1"),
        (change(model__vocab__zz=True), "gives the token 'zz' the id true"),
        (rename_token("a", "aqqq"), "has no token for the byte 0x61 ('a')"),
        (rename_token("a", "a b"), "has the token 'a b', but ' ' in it stands for no byte"),
        (rename_token("a", ""), "has the token '', but it is empty"),
        (change(added_tokens=[]), "<|endoftext|>"),
        (change(added_tokens=[{"id": 3, "content": EOS, "special": True}]), "two ids: 0 and 3"),
        (change(added_tokens=[{"id": 500, "content": "x y", "special": False}]), "not special"),
        (change(added_tokens=[{"content": "x"}]), "without content and id"),
    ],
)
def test_a_file_that_is_wrong_says_what_is(file, tmp_path, edit, message):
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        BPETokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_special_token(file, tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        BPETokenizer.load(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"no special token </s> \(it has: <\|endoftext\|>\)"):
        BPETokenizer.load(file, eos_token="</s>")


# Errors


def test_lone_surrogates_are_refused_or_replaced(tokenizer):
    text = "ok \ud800 é"
    with pytest.raises(InputError, match=r"the text has the lone surrogate \\ud800 at position 3"):
        tokenizer.encode(text)
    with pytest.raises(InputError, match=r"text 1 has the lone surrogate \\udfff at position 1"):
        tokenizer.encode_batch(["fine", "a\udfff", text])
    replaced = tokenizer.encode("ok \ufffd é")
    assert tokenizer.encode(text, errors="replace") == replaced
    assert tokenizer.encode_batch([text], errors="replace")[0].tolist() == replaced
    assert tokenizer.encode("\U0001f600\udc00", errors="replace") == tokenizer.encode("😀\ufffd")


def test_a_batch_with_a_lone_surrogate_is_not_counted():
    counter = BPETokenizer.counter()
    with pytest.raises(InputError, match="text 1 has the lone surrogate"):
        counter.add(["a", "\ud800"])
    assert len(counter) == 0
    counter.add(["a", "\ud800"], errors="replace")
    assert counter.items()[0] == [b"a", "\ufffd".encode()]


@pytest.mark.parametrize("bad", [-1, 500, 1 << 40, 1 << 70])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(InputError, match=f"id {bad} at position 1 is not in the vocabulary of 500"):
        tokenizer.decode([5, bad])
    for function in (tokenizer.id_to_token, tokenizer.stream_decoder().push):
        with pytest.raises(InputError, match=f"id {bad} is not in the vocabulary of 500"):
            function(bad)


def test_ids_that_are_no_row_of_integers_are_refused(tokenizer):
    for bad in ([0.5], [[1, 2]], ["a"], (0.5,), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(InputError, match="one row of integers"):
            tokenizer.decode(bad)


def test_bad_arguments(tokenizer):
    with pytest.raises(InputError, match="vocab_size is 256; it must be at least 257"):
        BPETokenizer.train(["a"], vocab_size=256)
    with pytest.raises(InputError, match="min_frequency is 0"):
        BPETokenizer.train(["a"], min_frequency=0)
    with pytest.raises(InputError, match="threads is 0"):
        tokenizer.encode_batch(["a"], threads=0)
    with pytest.raises(InputError, match="pattern is 'gpt5'; it must be one of gpt2, cl100k"):
        BPETokenizer.train(["a"], pattern="gpt5")
    with pytest.raises(InputError, match="errors is 'ignore'"):
        tokenizer.encode("a", errors="ignore")
    for function in (BPETokenizer.train, tokenizer.encode_batch, BPETokenizer.counter().add):
        with pytest.raises(InputError, match="one string"):
            function("text")
    for texts in ([], ["", ""]):
        with pytest.raises(InputError, match="empty"):
            BPETokenizer.train(texts)


def test_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.vocab == tokenizer.vocab
    assert copy.encode(prose(4)) == tokenizer.encode(prose(4))


def encode_in_child(tokenizer, text):
    ids, _ = tokenizer.encode_batch([text] * 4, threads=2)
    return ids.tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_go_on_encoding(tokenizer):
    text = prose(8, 60_000)
    expected = encode_in_child(tokenizer, text)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(encode_in_child, (tokenizer, text)) for _ in range(4)]
        assert [result.get(timeout=60) for result in results] == [expected] * 4


def test_the_python_implementation_gives_the_same(file, tokenizer, monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", "python")
    slow = BPETokenizer.load(file)
    assert isinstance(slow._model, bpe_reference.BPEModel)
    texts = [prose(7, 300), "", "é\n"]
    for ours, theirs in zip(
        slow.encode_batch(texts, True), tokenizer.encode_batch(texts, True), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    assert slow.decode(slow.encode(texts[0])) == texts[0]
    with pytest.raises(InputError, match="text 1 has the lone surrogate"):
        slow.encode_batch(["a", "\ud800"])
    assert slow.encode("\ud800", errors="replace") == tokenizer.encode("\ufffd")
    with pytest.raises(InputError, match="id 500 at position 0"):
        slow.decode([500])
    with pytest.raises(InputError, match="one row of integers"):
        slow.decode([0.5])
    again = BPETokenizer.train([prose(0), " ".join(FRAGMENTS) * 3], vocab_size=500)
    assert merges_of(again) == merges_of(tokenizer)
    o200k = BPETokenizer.train([prose(1)], vocab_size=500, pattern="o200k")
    monkeypatch.delenv("TINYLM_TOKENIZER")
    assert merges_of(o200k) == merges_of(
        BPETokenizer.train([prose(1)], vocab_size=500, pattern="o200k")
    )
