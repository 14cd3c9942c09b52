"""Splitting by hand against the published patterns in the regex package, and tokenizers."""

import sys
from functools import partial

import pytest
import regex
import tokenizers
from bpe_texts import PUBLISHED, awkward
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from word_texts import each_instruction_set

from tinylm.errors import InputError
from tinylm.tokenizer import bpe_reference, unicode_classes
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.bpe_json import to_alphabet
from tinylm.tokenizer.split_patterns import PATTERNS, REGEX, check_pattern, pattern_of_regex

C = compiled()
needs_extension = pytest.mark.skipif(C is None, reason="the compiled extension is not in use")

ORACLES = {name: regex.compile(pattern) for name, pattern in PUBLISHED.items()}

# Each alphabet makes a few alternatives compete.
ALPHABETS = [
    "aAsSdDtTmMlLvVeErRkK'\u017f\u212a\u0131\u0130\u00df ",  # contractions
    " \n\r\t\x0b\x85\xa0\u2028\u3000a.1",  # white space at all places
    "aA\u01c5\u02b0\u3042\u05d0\u0301\u0903\u20dd b'.S",  # kinds of letters and marks
    "0\u0661\u00b2\u216701a \n,",  # digits
    "!/.\r\n '\u0301sA\u20ac",  # punctuation and what follows it
    " 'aA1.\n\r\u00e9\u6f22\u017f\u0345\u00aa\U0001f600\u01c5\u094d\u200d",
]
# Lower-case in Unicode 16.0, without case in 17.0, which some versions of regex have.
RECLASSIFIED = "\u0295"
biased = st.one_of(
    awkward, *(st.text(alphabet=alphabet, max_size=16) for alphabet in ALPHABETS)
).map(lambda text: text.replace(RECLASSIFIED, ""))


def split_by_bits(text, pattern):
    """The pieces that every instruction set finds."""
    first, *rest = [C.bpe_pretokenize(text, pattern) for _ in each_instruction_set()]
    assert all(pieces == first for pieces in rest)
    return first


SPLITTERS = [pytest.param(bpe_reference.pretokenize, id="python")]
if C is not None:
    SPLITTERS.append(pytest.param(split_by_bits, id="c++"))
each_splitter = pytest.mark.parametrize("split", SPLITTERS)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@each_splitter
@each_pattern
@given(text=biased)
@example(" \n ")
@example("a'\u017f'\u212a'SS")
@settings(max_examples=800)
def test_pieces_are_those_of_the_published_pattern(split, pattern, text):
    assert split(text, pattern) == ORACLES[pattern].findall(text)


@needs_extension
@each_pattern
@given(parts=st.lists(biased, min_size=1, max_size=20), repeats=st.integers(50, 150))
@example(parts=["a" * 5000, " ", "1" * 5000, "\n \n" * 2000, "\u3000" * 3000], repeats=1)
@settings(max_examples=30)
def test_pieces_of_texts_that_are_read_in_several_windows(pattern, parts, repeats):
    text = "".join(parts * repeats)
    assert split_by_bits(text, pattern) == ORACLES[pattern].findall(text)


def splitter_of_tokenizers(pattern):
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")]
    if pattern != "gpt2":
        steps.insert(0, pre_tokenizers.Split(Regex(REGEX[pattern]), "isolated"))
    return pre_tokenizers.Sequence(steps)


@each_splitter
@each_pattern
@given(text=biased)
@settings(max_examples=300)
def test_pieces_are_those_of_tokenizers(split, pattern, text):
    expected = [piece for piece, _ in splitter_of_tokenizers(pattern).pre_tokenize_str(text)]
    assert [to_alphabet(piece.encode()) for piece in split(text, pattern)] == expected


@each_splitter
@pytest.mark.parametrize(
    ("pattern", "text", "pieces"),
    [
        ("gpt2", "", []),
        ("gpt2", "   ", ["   "]),
        ("gpt2", "  a", [" ", " a"]),
        ("gpt2", " \na", [" ", "\n", "a"]),
        ("gpt2", "a \n\n b", ["a", " \n\n", " b"]),
        ("gpt2", "it's I'LL", ["it", "'s", " I", "'", "LL"]),
        ("gpt2", "'tis ''s", ["'t", "is", " ''", "s"]),
        ("gpt2", "x\u3000\u3000y", ["x", "\u3000", "\u3000", "y"]),
        ("gpt2", "1a²", ["1", "a", "²"]),
        ("gpt2", "e\u0301", ["e", "\u0301"]),
        ("cl100k", "I'LL 12345 (a", ["I", "'LL", " ", "123", "45", " (", "a"]),
        ("cl100k", "it'\u017f", ["it", "'\u017f"]),
        ("cl100k", "it'\u212a", ["it", "'\u212a"]),
        ("cl100k", "a.\r\n\n  b", ["a", ".\r\n\n", " ", " b"]),
        ("cl100k", "x \n ", ["x", " \n", " "]),
        ("cl100k_tiktoken", "x \n ", ["x", " \n "]),
        ("cl100k_tiktoken", "x \n y", ["x", " \n", " y"]),
        ("o200k", "camelCase HTMLPage", ["camel", "Case", " HTMLPage"]),
        ("o200k", "don't I'LL", ["don't", " I'LL"]),
        ("o200k", "\u3042AB", ["\u3042", "AB"]),
        ("o200k", "\u0301AB e\u0301", ["\u0301", "AB", " e\u0301"]),
        ("o200k", "http://x\n/", ["http", "://", "x", "\n", "/"]),
        ("o200k", "?\n/\n!", ["?\n/\n", "!"]),
        ("whitespace", "don't  stop, 3.14\n", ["don't", " ", " stop,", " 3.14", "\n"]),
    ],
)
def test_known_pieces(split, pattern, text, pieces):
    assert split(text, pattern) == pieces


@each_splitter
@each_pattern
def test_long_runs_are_split_in_linear_time(split, pattern):
    """Tricky for an engine that backtracks: a run that each alternative reads to its end."""
    for unit in ("A", "a", " ", "\n", "\u3042A", "'s", "\u0301", " \n", "1", "!"):
        text = "\u3042" + unit * 200_000 + "\u3042"
        assert "".join(split(text, pattern)) == text


# Character classes

NAMES = ("UPPER", "LOWER", "UNCASED", "MARK", "NUMBER", "SPACE")
CATEGORIES = {
    "UPPER": r"[\p{Lu}\p{Lt}]",
    "LOWER": r"\p{Ll}",
    "UNCASED": r"[\p{Lm}\p{Lo}]",
    "MARK": r"\p{M}",
    "NUMBER": r"\p{N}",
    "SPACE": r"\s",
}
EXAMPLES = {
    "UPPER": "A",
    "LOWER": "a",
    "UNCASED": "あ",
    "MARK": "\u0301",
    "NUMBER": "1",
    "SPACE": "\t",
    "other": "!",
}


def members(ranges):
    chars = set()
    for item in ranges.split():
        ends, _, step = item.partition("/")
        first, last = (int(end, 16) for end in ends.split("-"))
        chars |= set(map(chr, range(first, last + 1, int(step or 1))))
    return chars


CLASSES = {name: members(getattr(unicode_classes, name)) for name in NAMES}
CLASS_OF = {char: name for name, chars in CLASSES.items() for char in chars}


def all_characters():
    return (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)


def gpt2_kind(split, char):
    """Letter, number, other or space, as seen from which neighbours ``char`` joins."""
    probes = {"letter": f"a{char}a", "number": f"1{char}1", "other": f"!{char}!"}
    return next((kind for kind, text in probes.items() if len(split(text)) == 1), "space")


def signature(split, char):
    """Different for characters of different classes."""
    return (
        gpt2_kind(partial(split, pattern="gpt2"), char),
        len(split(f"a{char}", "o200k")),
        len(split(f"{char}Ab", "o200k")),
    )


@each_splitter
def test_probes_tell_the_classes_apart(split):
    assert len({signature(split, char) for char in EXAMPLES.values()}) == len(EXAMPLES)


@needs_extension
def test_compiled_classes_are_those_of_the_specification_for_all_characters():
    assert C.bpe_unicode_version == unicode_classes.UNICODE_VERSION
    signatures = {name: signature(C.bpe_pretokenize, char) for name, char in EXAMPLES.items()}
    newlines = "\r\n"  # which o200k treats apart
    wrong = [
        char
        for char in all_characters()
        if char not in newlines
        and signature(C.bpe_pretokenize, char) != signatures[CLASS_OF.get(char, "other")]
    ]
    assert wrong == []


def test_classes_do_not_overlap():
    assert sum(map(len, CLASSES.values())) == len(CLASS_OF)


def test_classes_differ_from_the_regex_packages_only_where_its_unicode_is_newer():
    text = "".join(all_characters()).replace(RECLASSIFIED, "")
    for name, pattern in CATEGORIES.items():
        theirs = set(regex.findall(pattern, text))
        assert CLASSES[name] - {RECLASSIFIED} <= theirs
        assert all(char not in CLASS_OF for char in theirs - CLASSES[name])


@pytest.mark.slow
def test_classes_are_those_of_tokenizers_for_all_characters():
    def split(text):
        return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)

    if gpt2_kind(split, "\u1c89") != "letter" or gpt2_kind(split, "\U00010940") != "other":
        pytest.skip(f"tokenizers {tokenizers.__version__} does not have Unicode 16.0")
    kinds = {name: gpt2_kind(split, char) for name, char in EXAMPLES.items()}
    wrong = [
        char
        for char in all_characters()
        if gpt2_kind(split, char) != kinds[CLASS_OF.get(char, "other")]
    ]
    assert wrong == []


# Names


def test_regular_expressions_have_names():
    assert {pattern_of_regex(REGEX[name]) for name in PATTERNS} == set(PATTERNS)
    assert all(pattern_of_regex(PUBLISHED[name]) == name for name in ("gpt2", "cl100k", "o200k"))
    # Not the same in every engine: see split_patterns.py.
    assert pattern_of_regex(PUBLISHED["cl100k_tiktoken"]) is None
    assert pattern_of_regex(r"\w+") is None


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="pattern is 'gpt4'; it must be one of gpt2, cl100k, "):
        check_pattern("gpt4")
