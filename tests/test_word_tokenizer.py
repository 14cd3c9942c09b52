"""The word tokenizer as its users see it, with both implementations, and its files."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from word_texts import reference_words, texts_lists

from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer, WordTokenizer, load_tokenizer


@pytest.fixture(params=["c++", "python"])
def each_implementation(request, monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", request.param)
    return request.param


TEXTS = ["Hello world! This is a test.", "A test: HELLO, again", "ΑΣ.Β don't \ud800 x\udfff"]


@pytest.mark.usefixtures("each_implementation")
class TestTokenizer:
    def test_train_and_encode(self):
        tokenizer: Tokenizer = WordTokenizer.train(iter(TEXTS), vocab_size=6)
        assert tokenizer.vocab == {
            "<UNK>": 0,
            "<EOS>": 1,
            "hello": 2,
            "a": 3,
            "test": 4,
            "world": 5,
        }
        assert (tokenizer.kind, tokenizer.vocab_size) == ("word", 6)
        assert (tokenizer.unk_id, tokenizer.eos_id) == (0, 1)
        assert tokenizer.encode("A new TEST") == [3, 0, 4, 1]
        assert repr(tokenizer) == "WordTokenizer(vocab_size=6)"
        tokenizer.vocab.clear()
        assert tokenizer.vocab_size == len(tokenizer.vocab) == 6

    def test_counting_in_steps_is_training(self):
        counter = WordTokenizer.counter()
        for text in TEXTS:
            counter.add([text], 2)
        found, counts = counter.items()
        assert dict(zip(found, counts.tolist(), strict=True)) == reference_words(TEXTS)
        assert WordTokenizer.from_counter(counter).vocab == WordTokenizer.train(TEXTS).vocab

    def test_decode(self):
        tokenizer = WordTokenizer(["a", "b"])
        assert tokenizer.decode([2, 3, 2, 1, 0]) == "a b a <EOS> <UNK>"
        assert tokenizer.decode([2, 4, -1, 10**9, 3]) == "a <UNK> <UNK> <UNK> b"
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode(np.array([3, 2], dtype=np.uint16)) == "b a"
        assert tokenizer.decode(i for i in (3, 3)) == "b b"
        assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 4, -1)] == [
            "<UNK>",
            "<EOS>",
            "a",
            "<UNK>",
            "<UNK>",
        ]

    def test_decode_a_tensor(self):
        torch = pytest.importorskip("torch")
        assert WordTokenizer(["a", "b"]).decode(torch.tensor([2, 3])) == "a b"

    def test_pickle(self):
        tokenizer = WordTokenizer.train(TEXTS)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.vocab == tokenizer.vocab
        assert copy.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: WordTokenizer.train(TEXTS, vocab_size=2), "vocab_size is 2"),
            (lambda: WordTokenizer.from_counter(WordTokenizer.counter(), 2), "vocab_size is 2"),
            (lambda: WordTokenizer.train([]), "no words"),
            (lambda: WordTokenizer.train(["", " .,\u2028"]), "no words"),
            (lambda: WordTokenizer.train("one string"), "one string"),
            (lambda: WordTokenizer.train(TEXTS, threads=0), "threads is 0"),
            (lambda: WordTokenizer(["a"]).encode_batch(["a"], threads=-1), "threads is -1"),
            (lambda: WordTokenizer(["a"]).encode_batch("a b"), "one string"),
            (lambda: WordTokenizer(["a", "b", "a"]), "'a' is in the vocabulary twice"),
            (lambda: WordTokenizer(["<EOS>"]), "'<EOS>' is in the vocabulary twice"),
            (lambda: WordTokenizer(["a b"]), "holds a space"),
        ],
    )
    def test_bad_input(self, call, message):
        with pytest.raises(InputError, match=message) as info:
            call()
        assert "\n" not in str(info.value)


def test_importing_is_light():
    script = "import tinylm.tokenizer, sys; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- Files --------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    tokenizer = WordTokenizer.train([*TEXTS, "\ud800\udc00 \U00010000 u+0041"])
    path = tmp_path / "sub" / "tokenizer.json"
    tokenizer.save(path)
    for copy in (WordTokenizer.load(path), load_tokenizer(str(path))):
        assert isinstance(copy, WordTokenizer)
        assert copy.vocab == tokenizer.vocab
    again = path.with_name("again.json")
    WordTokenizer.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.json", "tokenizer.json"]


@settings(max_examples=50, deadline=None)
@given(texts_lists)
def test_any_vocabulary_survives_a_file(tmp_path_factory, texts):
    if not reference_words(texts):
        return
    tokenizer = WordTokenizer.train(texts)
    path = tmp_path_factory.mktemp("any") / "tokenizer.json"
    tokenizer.save(path)
    assert WordTokenizer.load(path).vocab == tokenizer.vocab


def broken(**changes):
    """The file of a good tokenizer with ``changes`` to it, as a function of its content."""

    def change(content):
        content["model"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "no model type"),
        (broken(type="Unigram"), "'Unigram'"),
        (broken(vocab=None), "does not map words to ids"),
        (broken(vocab={"<UNK>": "0"}), "does not map words to ids"),
        (broken(vocab={"<UNK>": 0, "a": 1}), "<EOS> is missing"),
        (broken(vocab={"<UNK>": 1, "<EOS>": 0}), "<UNK> is missing or its id is not 0"),
        (broken(vocab={"<UNK>": 0, "<EOS>": 1, "a": 3}), "ids of the 3 words"),
        (broken(vocab={"<UNK>": 0, "<EOS>": 1, "a": 2, "b": 2}), "ids of the 4 words"),
        (broken(vocab={"<UNK>": 0, "<EOS>": 1, " U+xyz": 2}), "code points"),
        (broken(vocab={"<UNK>": 0, "<EOS>": 1, " U+110000": 2}), "code points"),
        (lambda c: c.update(normalizer=None), "normalizer"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    ],
)
@pytest.mark.parametrize("load", [WordTokenizer.load, load_tokenizer])
def test_loading_a_broken_file(tmp_path, change, message, load):
    path = tmp_path / "tokenizer.json"
    WordTokenizer(["a"]).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=message) as info:
        load(path)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"model": 1}'])
@pytest.mark.parametrize("load", [WordTokenizer.load, load_tokenizer])
def test_loading_what_is_no_tokenizer(tmp_path, content, load):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(path)
    with pytest.raises(InputError, match=r"missing\.json"):
        load(tmp_path / "missing.json")


class TestHuggingFace:
    @pytest.fixture
    def theirs(self, tmp_path):
        tokenizers = pytest.importorskip("tokenizers")

        def load(tokenizer):
            path = tmp_path / "tokenizer.json"
            tokenizer.save(path)
            return tokenizers.Tokenizer.from_file(str(path))

        return load

    def test_same_ids_on_ordinary_text(self, theirs):
        texts = [path.read_text(encoding="utf-8") for path in library_sources()[:40]]
        texts += ["a\x1cb\x1fc\x85d\u2028e", "“Curly” don't, İstanbul Straße ÉTÉ Ж中😀", ""]
        ours = WordTokenizer.train(texts, vocab_size=3000)
        other = theirs(ours)
        for text in texts:
            ids = ours.encode(text)
            assert other.encode(text).ids == ids
            assert other.decode(ids, skip_special_tokens=False) == ours.decode(ids)
            plain = other.encode(text, add_special_tokens=False).ids
            assert plain == ours.encode(text, add_eos=False)

    def test_what_differs(self, theirs):
        """These are in the docstring of `save`; if one of them changes, it should too."""
        ours = WordTokenizer(["ας", "ασ", "<unk>"])
        other = theirs(ours)
        assert ours.encode("ΑΣ <UNK>") == [2, 4, 1]
        assert other.encode("ΑΣ <UNK>").ids == [3, 0, 1]

    def test_words_with_surrogates_keep_their_ids(self, theirs):
        ours = WordTokenizer(["x\ud800", "b"])
        assert theirs(ours).encode("b x").ids == ours.encode("b x") == [3, 0, 1]


def library_sources() -> list[Path]:
    return sorted(Path(os.__file__).parent.glob("*.py"))
