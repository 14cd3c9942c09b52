"""Which words the compiled tokenizer finds: those of its specification, by each instruction set."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_texts import (
    _C,
    SPACES,
    any_texts,
    assert_same,
    each_instruction_set,
    long_texts,
    reference_words,
    texts_lists,
    trap_texts,
    words,
)

from tinylm.tokenizer import word_reference as reference


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


def test_code_points():
    """One text each, of 1, 2 or 4 bytes a character; few of the last ones are assigned."""
    context = "x{0}, A{0}Σ, AΣ{0}b, {0}Y A.{0}Σ'"  # a comma ends the search for a sigma's context
    codes = [*range(0x20000), *range(0x20000, 0x110000, 16)]
    texts = [context.format(chr(c)) for c in codes]
    expected = reference_words(texts)
    for _ in each_instruction_set():
        found = words(texts, threads=2)
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


cut_texts = st.lists(
    st.one_of(
        trap_texts, st.sampled_from(["ΑΣ", ".", "Σ", "'", "\u00ad", " ", "aΣ:", "中。", "😀"])
    ),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(cut_texts, min_size=1, max_size=3), st.integers(1, 3))
def test_where_a_text_is_cut_does_not_matter(texts, threads):
    """Every length of pieces there is, as strings and as bytes."""
    vocab = {"<UNK>": 0, "<EOS>": 1}
    vocab |= {word: i + 2 for i, word in enumerate(reference_words(texts))}
    encoder = _C.WordEncoder(vocab)
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    for given_texts, plain in ((texts, texts), ([t.encode() for t in clean], clean)):
        want = reference.WordEncoder(vocab).encode_batch(plain, True, "i4")[0].tolist()
        expected = list(reference_words(plain).items())
        for length in range(1, max(map(len, given_texts)) + 2):
            found = encoder.encode_batch(given_texts, True, "i4", threads, piece_length=length)
            assert found[0].tolist() == want
            assert list(words(given_texts, threads, piece_length=length).items()) == expected


def test_instruction_sets_are_chosen_by_name():
    assert _C.instruction_sets()[0] == "portable"
    with pytest.raises(ValueError, match="no instruction set mmx"):
        _C.use_instruction_set("mmx")
