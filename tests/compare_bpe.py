"""Compares BPE ids and decoded text with tokenizers and tiktoken, on all documents of some files.

    python tests/compare_bpe.py --ranks folder train.jsonl.gz valid.jsonl.gz

For each pattern, vocabularies of three sizes are trained on the first file. ``--ranks`` names a
folder with published rank files, ``cl100k_base.tiktoken`` and ``o200k_base.tiktoken``, to compare
with as well. Ends with status 1 if any document differs.
"""

import argparse
import base64
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers
from bpe_texts import PUBLISHED

from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS

SIZES = (1000, 10_000, 100_000)
RANKS = [  # file, pattern, EOS
    ("cl100k_base", "cl100k", 100_257),
    ("cl100k_base", "cl100k_tiktoken", 100_257),
    ("o200k_base", "o200k", 199_999),
]


def read(file: Path) -> list[str]:
    """The documents, without lone surrogates, which others cannot take."""
    with gzip.open(file, "rb") as lines:
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
    return [text.encode("utf-8", "replace").decode() for text in texts]


def read_ranks(file: Path) -> dict[bytes, int]:
    """tiktoken's own reader keeps a copy by the file's path, whatever is in it later."""
    lines = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def ids_of(tokenizer: BPETokenizer, texts: list[str]) -> list[list[int]]:
    ids, offsets = tokenizer.encode_batch(texts)
    return [ids[a:b].tolist() for a, b in pairwise(offsets.tolist())]


def compare(texts: list[str], pattern: str, file: Path, ranks: Path, eos: int) -> dict[str, int]:
    """How many texts each check finds different; the files hold the same vocabulary."""
    ours = BPETokenizer.load(file)
    theirs = tokenizers.Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True
    of_openai = tiktoken.Encoding(
        "compared",
        pat_str=PUBLISHED[pattern],
        mergeable_ranks=read_ranks(ranks),
        special_tokens={EOS: eos},
    )
    from_ranks = BPETokenizer.load_tiktoken(ranks, pattern=pattern, special_tokens={EOS: eos})
    different = dict.fromkeys(("tokenizers", "tiktoken", "decoded"), 0)
    for start in range(0, len(texts), 500):  # bounds the memory of the others' lists
        some = texts[start : start + 500]
        ids = ids_of(ours, some)
        encoded = theirs.encode_batch_fast(some, add_special_tokens=False)
        different["tokenizers"] += sum(a != b.ids for a, b in zip(ids, encoded, strict=True))
        of_ranks = of_openai.encode_ordinary_batch(some, num_threads=2)
        different["tiktoken"] += sum(
            a != b for a, b in zip(ids_of(from_ranks, some), of_ranks, strict=True)
        )
        different["decoded"] += sum(ours.decode(i) != t for i, t in zip(ids, some, strict=True))
    return different


def vocabularies(train: list[str], ranks: Path | None, folder: Path) -> Iterator[tuple]:
    file, trained = folder / "tokenizer.json", folder / "ranks.tiktoken"
    for pattern in PUBLISHED:
        counter = BPETokenizer.counter(pattern)
        counter.add(train)
        for size in SIZES:
            tokenizer = BPETokenizer.from_counter(counter, size, min_frequency=1)
            tokenizer.save(file)
            tokenizer.save_tiktoken(trained)
            yield f"{pattern}, {tokenizer.vocab_size:,} tokens", pattern, file, trained, 0
    for name, pattern, eos in RANKS if ranks is not None else ():
        published = ranks / f"{name}.tiktoken"
        BPETokenizer.load_tiktoken(published, pattern=pattern, special_tokens={EOS: eos}).save(file)
        yield f"{name}, pattern {pattern}", pattern, file, published, eos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--ranks", type=Path)
    options = parser.parse_args()
    files = [read(file) for file in options.files]
    texts = [text for file in files for text in file]
    print(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")
    compared = failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, *vocabulary in vocabularies(files[0], options.ranks, Path(folder)):
            different = compare(texts, *vocabulary)
            compared, failures = compared + len(texts), failures + sum(different.values())
            print(name, *(f"{who} {n}" for who, n in different.items()), sep="; ", flush=True)
    print(f"{compared:,} documents encoded, {failures} differences")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
