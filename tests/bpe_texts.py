"""Texts that make splitting and merging go wrong, shared by the tests of BPE."""

import random

from hypothesis import strategies as st

# Word for word as published; for gpt2 and cl100k_tiktoken as tiktoken 0.9 has them.
PUBLISHED = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"""
    r"""|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "cl100k_tiktoken": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
            r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
            r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
    "whitespace": r" ?\S+|\s+(?!\S)|\s+",
}
# Fragments that make the pattern's alternatives compete.
FRAGMENTS = [
    *" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e\u200b\ufeff",
    *("  ", "   ", "\r\n", "\n\n", " \n", "\n ", "\t\t "),
    *("'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "'l", "'r", "'", "''", "’s", "n't"),
    *"aZéßſıİΣςあ漢가اनͅ\u0301\u0308\u200d\U0001d400\U00020000\U00031350",
    *"019²½Ⅷ٣०㊿\U0001d7d8\U00010107",
    *("word", "the", "Hello", "don't", "12345", "...", "!?", "--", "==", "_", "<|endoftext|>"),
    *"\x00\x01\x7f\u00ad\ufffd\uffff\ue000\U0010ffff\U0001f600\U0001f468\u200d\ufe0f",
]
awkward = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=30),
    st.text(alphabet=" a'1\n.é", max_size=40),
)


def prose(seed, size=4000):
    """Made-up text with few distinct words, so that pairs are frequent and many counts tie."""
    rng = random.Random(seed)
    syllables = [
        "ka",
        "to",
        "mi",
        "re",
        "é",
        "漢字",
        "sch",
        "ing",
        "a",
        "aa",
        "12",
        "'s",
        "-",
        "\n",
    ]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(150)]
    return " ".join(rng.choices(words, weights=range(150, 0, -1), k=size))
