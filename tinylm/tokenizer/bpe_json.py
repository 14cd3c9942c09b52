"""Byte-level BPE vocabularies and their file: Hugging Face's ``tokenizer.json``."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.files import write_json
from tinylm.tokenizer.hf_json import read_tokenizer_json
from tinylm.tokenizer.split_patterns import PATTERNS, REGEX, pattern_of_regex

EOS = "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """GPT-2's visible character for each byte: itself if printable Latin-1, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (byte for byte in range(256) if byte not in printable)
    code_points = {byte: byte for byte in printable}
    code_points |= {byte: 0x100 + i for i, byte in enumerate(rest)}
    return [chr(code_points[byte]) for byte in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def to_alphabet(token: bytes) -> str:
    """A token as ``tokenizer.json`` spells it."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


@dataclass(frozen=True, kw_only=True, eq=False)
class BPEVocabulary:
    """What defines a byte-level BPE tokenizer."""

    names: Sequence[str]
    """By id: the byte-level alphabet's spelling; of a special token, its text; empty if unused."""
    merges: npt.NDArray[np.uint32]
    """Rows of left, right and result, in the order of their ranks."""
    special_ids: Sequence[int]
    eos_id: int
    ignore_merges: bool = False
    ranks_are_ids: bool = False
    """A merge's rank is the id of its result, as in tiktoken, instead of its place in the list."""
    add_prefix_space: bool = False
    pattern: str = "gpt2"
    """A name from `tinylm.tokenizer.split_patterns`."""

    def tokens(self) -> list[bytes]:
        """The bytes of each token, by id."""
        special = set(self.special_ids)
        return [
            name.encode() if i in special else bytes(CHAR_TO_BYTE[char] for char in name)
            for i, name in enumerate(self.names)
        ]

    def byte_ids(self) -> list[int]:
        """For each byte, the id of the token that is just that byte."""
        special = set(self.special_ids)
        ids = {name: i for i, name in enumerate(self.names) if i not in special}
        return [ids[char] for char in BYTE_TO_CHAR]


def write_vocabulary(vocabulary: BPEVocabulary, path: str | os.PathLike[str]) -> None:
    """Writes a file that Hugging Face tokenizers reads too. Atomic.

    A merge's rank must be its place in the list: see `tinylm.tokenizer.bpe_files.with_merges`.
    """
    assert not vocabulary.ranks_are_ids
    names = vocabulary.names
    added_tokens = [
        {
            "id": i,
            "content": names[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in vocabulary.special_ids
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": vocabulary.add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    pre_tokenizer: dict[str, Any] = byte_level
    if vocabulary.pattern != "gpt2":
        split = {
            "type": "Split",
            "pattern": {"Regex": REGEX[vocabulary.pattern]},
            "behavior": "Isolated",
            "invert": False,
        }
        pre_tokenizer = {
            "type": "Sequence",
            "pretokenizers": [split, byte_level | {"use_regex": False}],
        }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": vocabulary.ignore_merges,
        "vocab": {name: i for i, name in enumerate(names) if name},
        "merges": [f"{names[a]} {names[b]}" for a, b, _ in vocabulary.merges.tolist()],
    }
    write_json(
        path,
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens,
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        },
    )


def read_vocabulary(path: str | os.PathLike[str], eos_token: str = EOS) -> BPEVocabulary:
    """Reads a byte-level BPE ``tokenizer.json``, whoever wrote it.

    Raises:
        InputError: the file is missing or broken, lacks ``eos_token``, or asks for something
            that `BPETokenizer` does not do.
    """
    return read_content(path, read_tokenizer_json(path), eos_token)


def read_content(
    path: str | os.PathLike[str], content: dict[str, Any], eos_token: str
) -> BPEVocabulary:
    """As `read_vocabulary`, of a file with this content."""
    return _Reader(path, content).read(eos_token)


def check_gaps(names: Mapping[int, str], path: str) -> None:
    """Raises `InputError` where ``names``, by id, would leave most ids unused.

    Files leave a few unused between tokens and special tokens; each costs a row of a model.
    """
    if max(names, default=0) >= 2 * len(names):
        missing = next(i for i in range(len(names)) if i not in names)
        raise InputError(
            f"{path} has no token with id {missing}, though the highest id is {max(names)}"
        )


class _Reader:
    """One file being read; every complaint names it."""

    def __init__(self, path: str | os.PathLike[str], content: dict[str, Any]) -> None:
        self._path = os.fspath(path)
        self._content = content
        self._model: dict[str, Any] = self._content["model"]

    def read(self, eos_token: str) -> BPEVocabulary:
        self._check_pipeline()
        pattern, add_prefix_space = self._splitting(self._content.get("pre_tokenizer"))
        self._check_model()
        specials = self._special_tokens()
        ids = self._ids(specials)
        if eos_token not in specials:
            known = ", ".join(specials) or "none"
            self._fail(f"has no special token {eos_token} (it has: {known})")
        names = {token_id: name for name, token_id in ids.items()}
        return BPEVocabulary(
            names=[names.get(i, "") for i in range(max(names) + 1)],
            merges=self._merges(ids, specials),
            special_ids=sorted(specials.values()),
            eos_id=specials[eos_token],
            ignore_merges=bool(self._model.get("ignore_merges")),
            add_prefix_space=add_prefix_space,
            pattern=pattern,
        )

    def _fail(self, problem: str) -> NoReturn:
        raise InputError(f"{self._path} {problem}")

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(f"is not a tokenizer.json: {what} is not a JSON object")
        return value

    def _refuse(self, part: str, value: Any) -> NoReturn:
        name = value.get("type", value) if isinstance(value, dict) else value
        self._fail(f"asks for {part} {json.dumps(name)}, which is not supported")

    def _check_pipeline(self) -> None:
        """Refuses all steps around splitting and the model but ByteLevel."""
        for part in ("normalizer", "truncation", "padding"):
            if self._content.get(part) is not None:
                self._refuse(part, self._content[part])
        for part in ("decoder", "post_processor"):
            value = self._content.get(part)
            is_optional = part == "post_processor"
            if (value is None and is_optional) or _type_of(value) == "ByteLevel":
                continue
            self._refuse(part, value)

    def _splitting(self, pre_tokenizer: Any) -> tuple[str, bool]:
        """The pattern and ``add_prefix_space``.

        The pattern is ByteLevel's own, or that of a Split before a ByteLevel without one.
        """
        kind = _type_of(pre_tokenizer)
        if kind == "ByteLevel":
            if pre_tokenizer.get("use_regex", True) is not True:
                self._fail("asks for pre_tokenizer ByteLevel with use_regex false: not supported")
            return "gpt2", bool(pre_tokenizer.get("add_prefix_space", True))
        if kind != "Sequence":
            self._refuse("pre_tokenizer", pre_tokenizer)
        steps = self._list(pre_tokenizer.get("pretokenizers"), "pre_tokenizer.pretokenizers")
        if [_type_of(step) for step in steps] != ["Split", "ByteLevel"]:
            names = " and ".join(str(_type_of(step)) for step in steps)
            self._fail(f"asks for pre_tokenizer Sequence of {names}, which is not supported")
        split, byte_level = steps
        for key in ("use_regex", "add_prefix_space"):  # a second split; a space for every piece
            if byte_level.get(key, True) is not False:
                self._fail(f"asks for Split and ByteLevel with {key} true: not supported")
        return self._pattern(split), False

    def _pattern(self, split: dict[str, Any]) -> str:
        # Every character is in a match, so keeping the matches is keeping all.
        behavior = split.get("behavior"), bool(split.get("invert"))
        if behavior not in (("Isolated", False), ("Removed", True)):
            self._fail(f"asks for pre_tokenizer Split with {behavior[0]}: not supported")
        regex = self._object(split.get("pattern"), "the pattern of Split").get("Regex")
        pattern = pattern_of_regex(regex) if isinstance(regex, str) else None
        if pattern is None:
            self._fail(
                f"splits by the pattern {json.dumps(split['pattern'])}, which is not supported; "
                f"those of {', '.join(PATTERNS)} are"
            )
        return pattern

    def _check_model(self) -> None:
        if self._model["type"] != "BPE":
            self._refuse("model", self._model)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self._model.get(key):
                self._fail(f"asks for model.{key} {self._model[key]!r}, which is not supported")

    def _special_tokens(self) -> dict[str, int]:
        """Ids of the added tokens, which must all be special."""
        specials: dict[str, Any] = {}
        for token in self._list(self._content.get("added_tokens") or [], "added_tokens"):
            token = self._object(token, "an added token")
            content, token_id = token.get("content"), token.get("id")
            if not isinstance(content, str) or not _is_id(token_id):
                self._fail(f"has an added token without content and id: {json.dumps(token)}")
            if has_surrogate(content):
                self._fail(f"has the special token {content!r}, which no text could have")
            if token.get("special") is not True:
                self._fail(f"has the added token {content!r} that is not special: not supported")
            specials[content] = token_id
        return specials

    def _ids(self, specials: Mapping[str, int]) -> dict[str, int]:
        """Ids of all tokens by name: each byte among them, spelled in the alphabet."""
        ids = dict(self._object(self._model.get("vocab"), "model.vocab"))
        for name, token_id in ids.items():
            if not _is_id(token_id):
                self._fail(f"gives the token {name!r} the id {json.dumps(token_id)}")
            unknown = [] if name in specials else [c for c in name if c not in CHAR_TO_BYTE]
            if unknown or not name:
                what = f"{unknown[0]!r} in it stands for no byte" if unknown else "it is empty"
                self._fail(f"has the token {name!r}, but {what}")
        for name, token_id in specials.items():
            if ids.setdefault(name, token_id) != token_id:
                self._fail(f"gives the special token {name!r} two ids: {ids[name]} and {token_id}")
        self._check_distinct(ids)
        for byte, char in enumerate(BYTE_TO_CHAR):
            if char not in ids or char in specials:
                self._fail(f"has no token for the byte 0x{byte:02X} ({char!r})")
        return ids

    def _check_distinct(self, ids: Mapping[str, int]) -> None:
        names: dict[int, str] = {}
        for name, token_id in ids.items():
            if token_id in names:
                self._fail(f"gives the tokens {names[token_id]!r} and {name!r} one id: {token_id}")
            names[token_id] = name
        check_gaps(names, self._path)

    def _merges(
        self, ids: Mapping[str, int], specials: Mapping[str, int]
    ) -> npt.NDArray[np.uint32]:
        merges = self._list(self._model.get("merges"), "model.merges")
        rows: list[tuple[int, int, int]] = []
        for number, merge in enumerate(merges, start=1):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(parts, list) and len(parts) == 2 and all(map(_is_str, parts))):
                self._fail(f"has a broken merge {number}: {json.dumps(merge)} is not two tokens")
            left, right = parts
            for name in (left, right, left + right):
                if name not in ids or name in specials:
                    kind = "special" if name in specials else "not in model.vocab"
                    self._fail(
                        f"has a broken merge {number}, {left!r} {right!r}: {name!r} is {kind}"
                    )
            rows.append((ids[left], ids[right], ids[left + right]))
        return last_of_each_pair(rows)

    def _list(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            self._fail(f"is not a tokenizer.json: {what} is not a JSON array")
        return value


def last_of_each_pair(rows: Iterable[Sequence[int]]) -> npt.NDArray[np.uint32]:
    """Merges with each pair once, where it came last: the rank that Hugging Face gives it."""
    results: dict[tuple[int, int], int] = {}
    for left, right, result in rows:
        results.pop((left, right), None)
        results[left, right] = result
    flat = [(left, right, result) for (left, right), result in results.items()]
    return np.array(flat, dtype=np.uint32).reshape(-1, 3)


def has_surrogate(name: str) -> bool:
    """Whether ``name`` has a lone surrogate, so that it cannot be encoded."""
    return any("\ud800" <= char <= "\udfff" for char in name)


def _type_of(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_str(value: Any) -> bool:
    return isinstance(value, str)
