"""From counted pieces to a byte-level BPE vocabulary."""

from collections.abc import Sequence

import numpy as np

from tinylm.errors import InputError
from tinylm.tokenizer.bpe_counter import BPECounter
from tinylm.tokenizer.bpe_json import BYTE_TO_CHAR, CHAR_TO_BYTE, BPEVocabulary, has_surrogate
from tinylm.tokenizer.progress import Progress

MAX_VOCAB_SIZE = 1 << 31  # ids are int32


def check_training(
    vocab_size: int, min_frequency: int, special_tokens: Sequence[str], eos_token: str
) -> None:
    """Raises `InputError` for settings that `learn_vocabulary` cannot follow."""
    _check_special_tokens(special_tokens, eos_token)
    least = len(special_tokens) + 256
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        names = ", ".join(special_tokens)
        raise InputError(
            f"vocab_size is {vocab_size}; it must be at least {least} (256 bytes and {names}) and "
            f"at most {MAX_VOCAB_SIZE}"
        )
    if min_frequency < 1:
        raise InputError(f"min_frequency is {min_frequency}; it must be at least 1")


def learn_vocabulary(
    counter: BPECounter,
    vocab_size: int,
    min_frequency: int,
    special_tokens: Sequence[str],
    eos_token: str,
    progress: Progress | None,
) -> BPEVocabulary:
    """The special tokens, the 256 bytes and what `BPETokenizer.train` says is merged from them.

    Raises:
        InputError: nothing was counted, or the disk is full.
    """
    if len(counter) == 0:
        raise InputError("the texts to train a tokenizer on are empty")
    names = [*special_tokens, *sorted(BYTE_TO_CHAR)]
    first_byte = len(special_tokens)
    byte_ids = [names.index(char, first_byte) for char in BYTE_TO_CHAR]
    # Else the text of a special token would become that token by merging.
    spelled = [name for name in special_tokens if CHAR_TO_BYTE.keys() >= set(name)]
    reserved = [bytes(CHAR_TO_BYTE[char] for char in name) for name in spelled]
    merges = counter.learn_merges(
        byte_ids, len(names), vocab_size, min_frequency, reserved, progress
    )
    for left, right, result in merges[np.argsort(merges[:, 2], kind="stable")].tolist():
        if result == len(names):
            names.append(names[left] + names[right])
    return BPEVocabulary(
        names=names,
        merges=merges,
        special_ids=list(range(first_byte)),
        eos_id=list(special_tokens).index(eos_token),
        pattern=counter.pattern,
    )


def _check_special_tokens(names: Sequence[str], eos_token: str) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(f"special_tokens is {names!r}; it must be a list of names")
    for i, name in enumerate(names):
        if not name or name in BYTE_TO_CHAR or has_surrogate(name):
            raise InputError(
                f"the special token {name!r} cannot be told from others: it is empty, the name of "
                "a byte, or has a lone surrogate"
            )
        if name in names[:i]:
            raise InputError(f"special_tokens has {name!r} twice")
    if eos_token not in names:
        known = ", ".join(names) or "none"
        raise InputError(f"special_tokens have no {eos_token} (they are: {known})")
