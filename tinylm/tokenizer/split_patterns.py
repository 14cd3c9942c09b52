"""The regular expressions that split text into pieces before BPE, and their names.

They are published as regular expressions, and saved as such; splitting itself is done by hand in
C++ (``csrc/pretokenize.cpp``) and, as its specification, by ``re`` in `bpe_reference`.
"""

from collections.abc import Mapping

from tinylm.errors import InputError

# The last alternatives of all but tiktoken's: white space up to the last newline in it; white
# space up to the end of the text or the last space before a word.
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"

REGEX: Mapping[str, str] = {
    # As published with GPT-2.
    "gpt2": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
        rf"|{_SPACES}"
    ),
    # As first published with GPT-4 and used since in files of Hugging Face tokenizers (Llama 3).
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}"
    ),
    # As in tiktoken since version 0.6: white space at the end of the text is one piece. Of its
    # `\p{N}{1,3}+` the plus is left out, as it changes nothing there but means "many times" in
    # the engine of Hugging Face tokenizers.
    "cl100k_tiktoken": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    # As published with GPT-4o.
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_SPACES}"
    ),
    # Whatever stands between white space, with the space before it.
    "whitespace": rf" ?\S+|{_SPACES}",
}

PATTERNS = tuple(REGEX)

# Other spellings of the same: tiktoken's own of GPT-2's.
_BY_REGEX = {regex: name for name, regex in REGEX.items()} | {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
}


def check_pattern(pattern: str) -> None:
    """Raises `InputError` unless ``pattern`` is the name of one."""
    if pattern not in REGEX:
        raise InputError(f"pattern is {pattern!r}; it must be one of {', '.join(PATTERNS)}")


def pattern_of_regex(regex: str) -> str | None:
    """The name of the pattern that is published as ``regex``, if any."""
    return _BY_REGEX.get(regex)
