"""The compiled word tokenizer against its specification, and the parts around it."""

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer, WordTokenizer, backend, implementation, load_tokenizer
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


def words(texts, threads=1):
    """The words that the compiled counter finds, with their counts, by first appearance."""
    counter = _C.WordCounter()
    counter.add(texts, threads)
    found, counts = counter.items()
    return dict(zip(found, counts.tolist(), strict=True))


def reference_words(texts):
    return dict(Counter(word for text in texts for word in reference.split_words(text)))


def assert_same(texts, threads=1):
    """Compares words, their order, and ids in texts' order with the reference."""
    expected = reference_words(texts)
    found = words(texts, threads)
    assert list(found.items()) == list(expected.items())
    vocab = {"<UNK>": 0, "<EOS>": 1} | {word: i + 2 for i, word in enumerate(expected)}
    dtypes = (np.uint16, np.int32, np.uint32) if len(vocab) <= 1 << 16 else (np.int32,)
    for add_eos in (True, False):
        for dtype in dtypes:
            got = _C.WordEncoder(vocab).encode_batch(texts, add_eos, np.dtype(dtype), threads)
            want = reference.WordEncoder(vocab).encode_batch(texts, add_eos, np.dtype(dtype))
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


# ---- Words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" .,!?;:\"'() \t\n", []),
        ("Hello world! This is a test.", ["hello", "world", "this", "is", "a", "test"]),
        ("don't", ["don", "t"]),
        ("“Curly” quotes… and-hyphens_stay", ["“curly”", "quotes…", "and-hyphens_stay"]),
        ("ΑΣ.Β", ["ασ", "β"]),  # the final sigma's context reaches across some separators
        ("ΑΣ,Β", ["ας", "β"]),
        ("Α.Σ", ["α", "ς"]),
        ("1Σ", ["1σ"]),
        ("ΑΣ\u00adΒ ΑΣ\u0345 ΑΣΣ", ["ασ\u00adβ", "ας\u0345", "ασς"]),
        ("İ", ["i\u0307"]),
        ("K Å", ["k", "å"]),
        ("ȺȾ" * 9, ["ⱥⱦ" * 9]),
        ("a\x1cb\x1dc\x1ed\x1fe\x85f\xa0g\u2028h\u3000i", list("abcdefghi")),
        ("a\u180eb\u200bc\u2060d\ufeffe\x00f", ["a\u180eb\u200bc\u2060d\ufeffe\x00f"]),
        (
            "\ud800 x\udfff \ud800\udc00 \U00010000",
            ["\ud800", "x\udfff", "\ud800\udc00", "\U00010000"],
        ),
        ("a a\x00 a\x00\x00", ["a", "a\x00", "a\x00\x00"]),
        ("<UNK> <EOS>", ["<unk>", "<eos>"]),
        ("é e\u0301", ["é", "e\u0301"]),
    ],
)
def test_words_of_known_texts(text, expected):
    assert reference.split_words(text) == expected
    assert list(words([text])) == list(dict.fromkeys(expected))
    assert_same([text])


@settings(max_examples=600, deadline=None)
@given(st.one_of(trap_texts, any_texts, long_texts))
def test_any_text_equals_the_reference(text):
    assert_same([text])


@settings(max_examples=200, deadline=None)
@given(texts_lists, st.integers(1, 4))
def test_any_texts_equal_the_reference(texts, threads):
    assert_same(texts, threads)


@pytest.mark.parametrize("context", ["{}", "A{}Σ", "AΣ{}b", "x{}", "{}Y ", "A.{}Σ'"])
def test_every_code_point(context):
    """One text a code point; the texts are 1, 2 or 4 bytes a character as the code point asks."""
    texts = [context.format(chr(c)) for c in range(0x110000)]
    found = words(texts, threads=2)
    expected = reference_words(texts)
    assert found == expected
    assert list(found) == list(expected)


def test_every_code_point_in_one_wide_text():
    assert_same(["".join(f"{chr(c)}Q " for c in range(0x110000))])


def test_spaces_are_those_of_re():
    everything = "".join(map(chr, range(0x110000)))
    assert re.findall(r"\s", everything) == SPACES
    assert len(SPACES) == 29


@pytest.mark.parametrize("length", [*range(40), 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("wide", ["", "é ", "中 ", "😀 "])
def test_word_lengths_and_alignments(length, wide):
    word = ("AbCdEfGhIj" * 20)[:length]
    texts = [wide + " " * shift + word + tail for shift in range(20) for tail in ("", ".", "é")]
    assert_same(texts)


@pytest.mark.parametrize("wide", ["", "é", "中", "😀"])
def test_every_ascii_character_in_a_block(wide):
    """Whole blocks of ASCII have a path of their own, for each width of characters."""
    assert_same(
        [f"{'Ab' * 8}{'Zy' * at}{chr(c)}" * 3 + wide for c in range(128) for at in range(8)]
    )


@pytest.mark.parametrize("unit", ["a", "Σ", "Σ.", "é", "中", "😀", "'", "İ", "\ud800"])
def test_long_runs(unit):
    """A run that no separator cuts is one piece; work and memory stay linear."""
    assert_same([unit * 200_000, "x " + unit * 50_000 + " y"], threads=2)


def test_texts_longer_than_a_piece_keep_the_context_of_sigma():
    for kind in "a", "é", "中", "😀":
        text = (f"ΑΣ.Β ΑΣ, {kind}ΣΑΣ '" * 5000) + "Σ"
        assert_same([text], threads=2)


# ---- Counting --------------------------------------------------------------------------------


def test_ties_go_to_the_first_appearance():
    texts = ["b a c", "a b c d", "e d"]
    for threads in (1, 2, 3):
        counter = _C.WordCounter()
        counter.add(texts[:2], threads)
        counter.add(texts[2:], threads)
        assert counter.most_common(9) == ["b", "a", "c", "d", "e"]
        assert counter.most_common(2) == ["b", "a"]
        assert counter.items()[0] == ["b", "a", "c", "d", "e"]
        counter.add(["e e e"], threads)
        assert counter.most_common(1) == ["e"]
        assert counter.items()[0] == ["b", "a", "c", "d", "e"]


def test_threads_do_not_change_the_counts():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"W{n}" for n in rng.zipf(1.2, 3000) % 5000) for _ in range(80)]
    expected = reference.WordCounter()
    expected.add(texts)
    for threads in (1, 2, 5):
        counter = _C.WordCounter()
        for start in range(0, len(texts), 30):
            counter.add(texts[start : start + 30], threads)
        for n in (0, 1, 100, 10**6):
            assert counter.most_common(n) == expected.most_common(n)
        found, counts = counter.items()
        want, want_counts = expected.items()
        assert found == want
        np.testing.assert_array_equal(counts, want_counts)
        assert counts.dtype == np.int64


def test_one_counter_in_several_threads():
    counter = _C.WordCounter()
    texts = ["x y z " * 1000]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: counter.add(texts, 2), range(20)))
    assert dict(zip(*counter.items(), strict=True)) == dict.fromkeys("xyz", 20_000)


# ---- Encoding --------------------------------------------------------------------------------


def test_batch_equals_single_and_threads_do_not_change_it():
    texts = [f"One {i}, two. UNKNOWN{i}! " * (i % 70) for i in range(300)] + ["", "x" * 99]
    tokenizer = WordTokenizer.train(texts[:150])
    single = [tokenizer.encode(text) for text in texts]
    for threads in (None, 1, 2, 7, 10**5):
        ids, offsets = tokenizer.encode_batch(texts, threads=threads)
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == single
    without = [tokenizer.encode(text, add_eos=False) for text in texts]
    assert single == [[*ids, 1] for ids in without]


def test_empty_batches():
    tokenizer = WordTokenizer(["a"])
    for texts, eos, ids, offsets in (
        ([], True, [], [0]),
        (["", ""], True, [1, 1], [0, 1, 2]),
        (["", " "], False, [], [0, 0, 0]),
    ):
        got = tokenizer.encode_batch(texts, add_eos=eos)
        assert [a.tolist() for a in got] == [ids, offsets]


@pytest.mark.parametrize(
    ("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32), (3, np.uint16)]
)
def test_ids_are_16_bits_where_they_fit(size, dtype):
    tokenizer = WordTokenizer([f"w{i}" for i in range(2, size)])
    ids, offsets = tokenizer.encode_batch([f"w{size - 1} w2 no"])
    assert (ids.dtype, offsets.dtype) == (dtype, np.int64)
    assert ids.tolist() == [size - 1, 2, 0, 1]
    assert ids.flags.owndata
    assert ids.flags.writeable


def test_the_compiled_encoder_refuses_what_it_cannot_do():
    encoder = _C.WordEncoder({"<UNK>": 0, "<EOS>": 1, "a": 70_000})
    with pytest.raises(OverflowError, match="70000"):
        encoder.encode_batch(["a"], True, np.uint16)
    with pytest.raises(TypeError, match="float32"):
        encoder.encode_batch(["a"], True, np.float32)
    with pytest.raises(TypeError, match=r"texts\[1\] is of type int"):
        encoder.encode_batch(["a", 1], True, np.int32)
    with pytest.raises(TypeError, match=r"texts\[0\] is of type bytes"):
        _C.WordCounter().add([b"a"])


def test_str_subclasses_and_any_iterable():
    class Text(str):
        __slots__ = ()

    tokenizer = WordTokenizer(["a", "b"])
    assert tokenizer.encode(Text("B a")) == [3, 2, 1]
    ids, _ = tokenizer.encode_batch(text for text in ("A", "b"))
    assert ids.tolist() == [2, 1, 3, 1]


def test_other_threads_run_meanwhile():
    """With the GIL held, this thread would wait once for nearly all of the time."""
    tokenizer = WordTokenizer(["lorem", "ipsum"])
    texts = ["Lorem ipsum, dolor! " * 100_000] * 30
    longest_wait = 0.0
    with ThreadPoolExecutor(1) as pool:
        start = last = time.perf_counter()
        job = pool.submit(tokenizer.encode_batch, texts, threads=1)
        while not job.done():
            now = time.perf_counter()
            longest_wait = max(longest_wait, now - last)
            last = now
        took = time.perf_counter() - start
    assert longest_wait < took / 2


def test_encoding_after_fork_and_in_threads():
    tokenizer = WordTokenizer(["a", "b"])
    texts = ["A b " * 100_000] * 4
    expected = tokenizer.encode_batch(texts, threads=2)[0]
    with ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(lambda _: tokenizer.encode_batch(texts, threads=2), range(8)):
            np.testing.assert_array_equal(ids, expected)
    if not hasattr(os, "fork"):
        return
    script = (
        "import os; from tinylm.tokenizer import WordTokenizer\n"
        "t = WordTokenizer(['a']); texts = ['a ' * 50_000] * 8\n"
        "n = t.encode_batch(texts, threads=2)[0].sum()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(int(t.encode_batch(texts, threads=2)[0].sum() != n))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- The tokenizer ---------------------------------------------------------------------------


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


# ---- Files -----------------------------------------------------------------------------------


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


# ---- Which implementation runs ---------------------------------------------------------------


def test_the_compiled_one_runs_by_default(monkeypatch):
    monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
    assert implementation()[0] == "c++"
    assert isinstance(WordTokenizer.counter(), _C.WordCounter)


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", "python")
    assert implementation() == ("python", "TINYLM_TOKENIZER=python")
    assert isinstance(WordTokenizer.counter(), reference.WordCounter)
    monkeypatch.setenv("TINYLM_TOKENIZER", "rust")
    with pytest.raises(InputError, match="'rust'; it must be one of auto, c\\+\\+, python"):
        implementation()


@pytest.fixture
def fresh_choice():
    """Forgets what was chosen, before and after."""
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestFallback:
    def test_another_unicode_version(self, monkeypatch, caplog):
        monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
        monkeypatch.setattr(_C, "unicode_version", "1.1.5")
        self.assert_falls_back(caplog, f"1.1.5, this Python {unicodedata.unidata_version}")

    def test_no_extension(self, monkeypatch, caplog):
        monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
        monkeypatch.delattr("tinylm._C")
        monkeypatch.setitem(sys.modules, "tinylm._C", None)
        self.assert_falls_back(caplog, "does not import")

    def assert_falls_back(self, caplog, reason):
        with caplog.at_level(logging.WARNING, logger="tinylm"):
            assert isinstance(WordTokenizer.counter(), reference.WordCounter)
            assert WordTokenizer(["a"]).encode("A b") == [2, 0, 1]
        assert implementation()[0] == "python"
        assert reason in implementation()[1]
        assert [reason in record.getMessage() for record in caplog.records] == [True]

    def test_insisting_fails(self, monkeypatch):
        monkeypatch.setenv("TINYLM_TOKENIZER", "c++")
        monkeypatch.setattr(_C, "unicode_version", "1.1.5")
        with pytest.raises(InputError, match=r"is 'c\+\+', but .* Unicode 1\.1\.5"):
            WordTokenizer(["a"])


def test_threads_propagate_errors_and_end():
    """A text that is no str is found before any thread starts, and nothing is left running."""
    before = threading.active_count()
    with pytest.raises(TypeError):
        _C.WordCounter().add(["a " * 100_000, None], 4)
    assert threading.active_count() == before
