"""Byte-level BPE by tinylm and by others, behind one interface.

A side is made of a file and gives ids of texts; a fresh one has seen no text. Who cannot be
imported is left out.
"""

import base64
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS
from tinylm.tokenizer.split_patterns import REGEX

# One with `taskset -c 0`: several sides start as many threads as there are processors for them.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Vocabulary:
    """One and the same in the files that sides can read."""

    pattern: str
    json: Path
    ranks: Path
    encoding: str | None = None  # its name, if it is a published one


class Tinylm:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokenizer = BPETokenizer.load(vocabulary.json)

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch(texts, threads=THREADS)

    def flat(self, encoded) -> np.ndarray:
        return encoded[0]

    def decode(self, ids: np.ndarray) -> bytes:
        return self.tokenizer.decode_bytes(ids)


class TinylmFromBytes(Tinylm):
    from_bytes = True  # of UTF-8, whatever else is timed


class Gigatoken:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import gigatoken

        self.tokenizer = gigatoken.Tokenizer(str(vocabulary.json))

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch(texts, parallel=THREADS > 1)

    def flat(self, encoded) -> np.ndarray:
        import awkward

        return awkward.flatten(encoded).to_numpy()

    def decode(self, ids: np.ndarray) -> bytes:
        return self.tokenizer.decode(ids)


class GigatokenFromBytes(Gigatoken):
    """It has to make UTF-8 of a str first; others do that as they go."""

    from_bytes = True


class FlatBytes:
    """Flat ids come as bytes."""

    def flat(self, encoded) -> np.ndarray:
        return np.frombuffer(encoded[0], np.uint32)


class Fastokens(FlatBytes):
    def __init__(self, vocabulary: Vocabulary) -> None:
        import fastokens

        if vocabulary.encoding:  # it refuses the other file
            self.tokenizer = fastokens.Tokenizer.from_tiktoken(
                str(vocabulary.ranks), encoding=vocabulary.encoding
            )
        else:
            self.tokenizer = fastokens.Tokenizer.from_file(str(vocabulary.json))

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch_flat(texts)

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist())


class Splintr(FlatBytes):
    def __init__(self, vocabulary: Vocabulary) -> None:
        import splintr

        self.tokenizer = splintr.from_json(str(vocabulary.json))

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch_flat(texts)

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist())


class Tokie:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import tokie

        self.tokenizer = tokie.Tokenizer.from_json(str(vocabulary.json))

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch_flat(texts, add_special_tokens=False)

    def flat(self, encoded) -> np.ndarray:
        return encoded[0]

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist())


class Quicktok:
    """Reads only the published vocabularies that it comes with."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import quicktok

        self.tokenizer = quicktok.Tokenizer(vocabulary.encoding, "")

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch(texts, THREADS, False)

    def flat(self, encoded) -> np.ndarray:
        return encoded[0]


def read_ranks(file: Path) -> dict[bytes, int]:
    """tiktoken's own reader keeps a copy by the file's path, whatever is in it later."""
    lines = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


class Tiktoken:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import tiktoken

        ranks = read_ranks(vocabulary.ranks)
        special = {} if vocabulary.encoding else {EOS: 0}
        self.tokenizer = tiktoken.Encoding(
            "bench",
            pat_str=REGEX[vocabulary.pattern],
            mergeable_ranks=ranks,
            special_tokens=special,
        )

    def encode(self, texts: Sequence[str]) -> object:
        if THREADS == 1:
            return [self.tokenizer.encode_ordinary(text) for text in texts]
        return self.tokenizer.encode_ordinary_batch(texts, num_threads=THREADS)

    def flat(self, encoded) -> np.ndarray:
        return np.concatenate([np.array(ids, np.uint32) for ids in encoded])

    def decode(self, ids: np.ndarray) -> bytes:
        return self.tokenizer.decode_bytes(ids.tolist())


class Tokenizers:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary.json))
        self.tokenizer.encode_special_tokens = True
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if THREADS > 1 else "false"

    def encode(self, texts: Sequence[str]) -> object:
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def flat(self, encoded) -> np.ndarray:
        return np.concatenate([np.array(e.ids, np.uint32) for e in encoded])

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


SIDES = {
    name: kind
    for name, kind in {
        "tinylm": Tinylm,
        "tinylm from bytes": TinylmFromBytes,
        "gigatoken": Gigatoken,
        "gigatoken from bytes": GigatokenFromBytes,
        "quicktok": Quicktok,
        "splintr": Splintr,
        "fastokens": Fastokens,
        "tokie": Tokie,
        "tiktoken": Tiktoken,
        "tokenizers": Tokenizers,
    }.items()
    if importlib.util.find_spec(name.split()[0])
}
SLOW = {"tiktoken", "tokenizers"}  # are timed less often
