"""BPE vocabularies in other files: tiktoken's ranks, GPT-2's ``vocab.json`` and ``merges.txt``."""

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tinylm.errors import InputError
from tinylm.files import atomic_write
from tinylm.tokenizer.bpe_json import (
    BPEVocabulary,
    check_gaps,
    has_surrogate,
    read_content,
    to_alphabet,
)
from tinylm.tokenizer.split_patterns import check_pattern

MAX_IDS = 1 << 31

Path = str | os.PathLike[str]
# (left, right) -> (rank, result)
MergeTable = Mapping[tuple[int, int], tuple[int, int]]


# tiktoken


def read_tiktoken(
    path: Path, pattern: str, special_tokens: Mapping[str, int], eos_token: str
) -> BPEVocabulary:
    """Reads lines of a token in base64 and its rank, which is its id.

    Raises:
        InputError: a line is broken, a byte has no token, an id has two tokens, or ``eos_token``
            is not among ``special_tokens``.
    """
    check_pattern(pattern)
    name = os.fspath(path)
    ranks = _read_ranks(path)
    if eos_token not in special_tokens:
        known = ", ".join(special_tokens) or "none"
        raise InputError(f"special_tokens have no {eos_token} (they are: {known})")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise InputError(f"{name} has no token for the byte 0x{byte:02X}")
    names = {rank: to_alphabet(token) for token, rank in ranks.items()}
    spelled = set(names.values())
    for special, token_id in special_tokens.items():
        if not special or special in spelled:
            raise InputError(f"the special token {special!r} is empty or a token of {name} too")
        if has_surrogate(special):
            raise InputError(f"the special token {special!r} has a lone surrogate")
        if not 0 <= token_id < MAX_IDS or token_id in names:
            reason = f"that of {names[token_id]!r} too" if token_id in names else "no id"
            raise InputError(f"the id of the special token {special!r}, {token_id}, is {reason}")
        names[token_id] = special
    check_gaps(names, name)
    return BPEVocabulary(
        names=[names.get(i, "") for i in range(max(names) + 1)],
        merges=_all_merges(ranks),
        special_ids=sorted(special_tokens.values()),
        eos_id=special_tokens[eos_token],
        ignore_merges=True,
        ranks_are_ids=True,
        pattern=pattern,
    )


def write_tiktoken(vocabulary: BPEVocabulary, path: Path) -> None:
    """Writes the tokens that are not special, and their ids as ranks. Atomic.

    Raises:
        InputError: tiktoken would merge by these ranks otherwise than the vocabulary does.
    """
    _refuse_prefix_space(vocabulary, "a rank file")
    if not vocabulary.ranks_are_ids:
        _check_ranks(vocabulary)
    special = set(vocabulary.special_ids)
    with atomic_write(path) as file:
        for token_id, token in enumerate(vocabulary.tokens()):
            if token and token_id not in special:
                file.write(base64.b64encode(token) + b" %d\n" % token_id)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line:
            continue
        where = f"{os.fspath(path)}, line {number}"
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{where}: {_shown(line)} is not a token in base64 and a rank"
            ) from None
        if not token or not 0 <= rank < MAX_IDS:
            raise InputError(f"{where}: the token is empty or its rank, {rank}, is no id")
        if token in ranks:
            raise InputError(f"{where}: the token {token!r} has the rank {ranks[token]} already")
        if rank in lines:
            raise InputError(f"{where}: the rank {rank} is that of line {lines[rank]} too")
        ranks[token] = rank
        lines[rank] = number
    return ranks


def _all_merges(ranks: Mapping[bytes, int]) -> npt.NDArray[np.uint32]:
    """Every two tokens that joined are a token: tiktoken merges them all, by the result's rank."""
    rows = [
        (ranks[token[:i]], ranks[token[i:]], rank)
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return np.array(rows, dtype=np.uint32).reshape(-1, 3)


# Ranks and merges
#
# With ranks, any two neighbours that joined are a token may merge, and a token's rank is its id.
# With merges, only listed pairs may. The two agree if every token, given just its bytes, is reached
# by merging, its last merge is of tokens with smaller ids, and these last merges are in the order
# of the ids: then what the bytes of a token are before its rank comes up does not depend on what
# stands around them, as no merge has crossed their ends. So only the last merge's pair is ever
# found side by side, and both do it at the same time.


def with_merges(vocabulary: BPEVocabulary) -> BPEVocabulary:
    """The vocabulary with a list of merges that gives the same ids if its ranks are its ids.

    Raises:
        InputError: there is none.
    """
    if not vocabulary.ranks_are_ids:
        return vocabulary
    table = {(left, right): (result, result) for left, right, result in vocabulary.merges.tolist()}
    rows: list[tuple[int, int, int]] = []
    for token_id, symbols in _spelled_tokens(vocabulary):
        merged, last = _merge(symbols, table)
        if merged != [token_id]:
            continue  # Only ever a whole piece.
        _, left, right = last
        if max(left, right) > token_id:
            raise InputError(
                f"the token {vocabulary.names[token_id]!r} has a lower rank than one that it is "
                "merged from, so no list of merges gives the ids of this vocabulary"
            )
        rows.append((left, right, token_id))
    merges = np.array(rows, dtype=np.uint32).reshape(-1, 3)
    return replace(vocabulary, merges=merges, ranks_are_ids=False)


def _check_ranks(vocabulary: BPEVocabulary) -> None:
    """Raises `InputError` unless merging by ids as ranks is merging by the list."""
    table = _table(vocabulary)
    previous_rank = -1
    for token_id, symbols in _spelled_tokens(vocabulary):
        merged, (rank, left, right) = _merge(symbols, table)
        if merged != [token_id] or max(left, right) > token_id or rank < previous_rank:
            reason = "its id is not in the order of the merges"
            if merged != [token_id]:
                reason = "no merges lead to it"
            raise InputError(
                f"the token {vocabulary.names[token_id]!r} cannot be in a rank file: {reason}, so "
                "tiktoken would give other ids"
            )
        previous_rank = rank


def _table(vocabulary: BPEVocabulary) -> MergeTable:
    rows = enumerate(vocabulary.merges.tolist())
    return {(left, right): (rank, result) for rank, (left, right, result) in rows}


def _spelled_tokens(vocabulary: BPEVocabulary) -> Iterable[tuple[int, list[int]]]:
    """Each token of several bytes that is not special, and the ids of its bytes."""
    special, byte_ids = set(vocabulary.special_ids), vocabulary.byte_ids()
    for token_id, token in enumerate(vocabulary.tokens()):
        if len(token) > 1 and token_id not in special:
            yield token_id, [byte_ids[byte] for byte in token]


def _merge(symbols: list[int], merges: MergeTable) -> tuple[list[int], tuple[int, int, int]]:
    """What ``symbols``, few, become, and the last merge: its rank, left and right."""
    last = (-1, -1, -1)
    while True:
        pairs = enumerate(pairwise(symbols))
        found = [(*merges[pair], i) for i, pair in pairs if pair in merges]
        if not found:
            return symbols, last
        rank, result, i = min(found, key=lambda item: (item[0], item[2]))
        last = (rank, symbols[i], symbols[i + 1])
        symbols = [*symbols[:i], result, *symbols[i + 2 :]]


# GPT-2


def read_gpt2(
    vocab_path: Path,
    merges_path: Path,
    pattern: str,
    special_tokens: Sequence[str],
    eos_token: str,
) -> BPEVocabulary:
    """Reads ``vocab.json``, tokens and ids, and ``merges.txt``, a merge in each line.

    Raises:
        InputError: a file is missing or broken; for ``merges.txt`` the line is named.
    """
    check_pattern(pattern)
    vocab = _read_json_object(vocab_path)
    merges = _read_merges(merges_path, vocab, special_tokens)
    for name in special_tokens:
        if name not in vocab:
            raise InputError(f"{os.fspath(vocab_path)} has no token {name!r}, said to be special")
    content: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "added_tokens": [
            {"content": name, "id": vocab[name], "special": True} for name in special_tokens
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
    }
    return replace(read_content(vocab_path, content, eos_token), pattern=pattern)


def write_gpt2(vocabulary: BPEVocabulary, vocab_path: Path, merges_path: Path) -> None:
    """Writes both files, each atomically.

    Raises:
        InputError: they cannot hold all that the vocabulary does.
    """
    _refuse_prefix_space(vocabulary, "vocab.json")
    vocabulary = with_merges(vocabulary)
    if vocabulary.ignore_merges:
        _check_all_reached(vocabulary)
    names = vocabulary.names
    vocab = {name: i for i, name in enumerate(names) if name}
    lines = ["#version: 0.2", *(f"{names[a]} {names[b]}" for a, b, _ in vocabulary.merges.tolist())]
    with atomic_write(vocab_path) as file:
        file.write(json.dumps(vocab, ensure_ascii=False).encode())
    with atomic_write(merges_path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _check_all_reached(vocabulary: BPEVocabulary) -> None:
    table = _table(vocabulary)
    for token_id, symbols in _spelled_tokens(vocabulary):
        if _merge(symbols, table)[0] != [token_id]:
            raise InputError(
                f"no merges lead to the token {vocabulary.names[token_id]!r}, which is only ever "
                "a whole piece: vocab.json and merges.txt cannot say so; save a tokenizer.json"
            )


def _read_merges(
    path: Path, vocab: Mapping[str, Any], special_tokens: Sequence[str]
) -> list[list[str]]:
    merges = []
    # Not splitlines(): a token may hold one of the rarer line ends.
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line or (number == 1 and line.startswith(b"#version")):
            continue
        where = f"{os.fspath(path)}, line {number}"
        try:
            left, right = line.decode().split(" ")
        except ValueError:
            raise InputError(f"{where}: {_shown(line)} is not two tokens") from None
        for name in (left, right, left + right):
            if name not in vocab or name in special_tokens:
                kind = "special" if name in special_tokens else "not in the vocabulary"
                raise InputError(f"{where}: of {left!r} {right!r}, {name!r} is {kind}")
        merges.append([left, right])
    return merges


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{os.fspath(path)} is not a JSON object of tokens and ids")
    return content


def _refuse_prefix_space(vocabulary: BPEVocabulary, kind: str) -> None:
    if vocabulary.add_prefix_space:
        raise InputError(f"{kind} cannot say that a space is put before a text; save as JSON")


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def _shown(line: bytes) -> str:
    """A line for an error message: short and printable."""
    text = line[:40].decode("utf-8", "backslashreplace")
    return repr(text + "…" * (len(line) > 40))
