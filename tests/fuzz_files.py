"""Feeds the readers of tokenizer files with files that mutation broke.

Usage: python tests/fuzz_files.py [SECONDS [SEED]]

Whatever is in a file, it either loads, and then text comes back from its ids and from those of the
saved tokenizer, or it is refused by an `InputError`. Anything else is written to the folder
``build/fuzz`` with what it raised, and ends the run.
"""

import copy
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpe_texts import FRAGMENTS, prose

from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer, WordTokenizer, load_tokenizer
from tinylm.tokenizer.split_patterns import PATTERNS

MAX_SECONDS = 10  # for any one file; all are small
MAX_BYTES = 2 << 30  # of memory, above what is in use at the start
SPECIALS = {"<|endoftext|>": 500, "<|pad|>": 501}
TEXTS = ["", "the cat's", " 12345\r\n\n x", "".join(FRAGMENTS), "<|endoftext|> <UNK> ka to mi"]
# What may stand anywhere in JSON, and what readers like to stumble over.
VALUES = [
    *(None, True, False, 0, 1, -1, 255, 256, 65_536, 2**31 - 1, 2**31, 2**32, 2**63, 10**30),
    *(0.0, 1.5, float("nan"), float("inf"), "", " ", "a", "Ġ", "a b", "\ud800", "\x00", "漢"),
    *("BPE", "WordLevel", "ByteLevel", "Sequence", "Split", "<|endoftext|>", [], {}, [[]]),
    *(["a", "b"], [1, 2], {"type": "ByteLevel"}, {"type": []}, {"Regex": "("}, "x" * 5000),
]
TOKENS = [
    b"",
    b"AA==",
    b"YQ==",
    b"YWI=",
    b"!",
    b"0",
    b"-1",
    b"1_0",
    b"99999999999",
    b"a b c",
    b"\xff",
]


class Failure(Exception):
    """A tokenizer that loaded does not give its text back."""


def seeds(folder: Path) -> list[tuple[Any, ...]]:
    """Kinds of readers with the contents of their files."""
    texts = [prose(0, 300)]
    path, second = folder / "seed", folder / "seed2"
    found = []
    for pattern in PATTERNS:
        names = ["<|endoftext|>", "<|pad|>", "Ġthe cat", "é"][: 1 + len(found) % 4]
        BPETokenizer.train(texts, 290, pattern=pattern, special_tokens=names).save(path)
        content = json.loads(path.read_bytes())
        found.append(("json", path.read_bytes()))
        # The other form of merges.
        content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
        content["model"]["ignore_merges"] = pattern == "o200k"
        for name in names[1:]:  # Nor need added tokens be in the model.
            del content["model"]["vocab"][name]
        found.append(("json", json.dumps(content).encode()))
    WordTokenizer.train(texts, 60).save(path)
    found.append(("json", path.read_bytes()))
    tokenizer = BPETokenizer.train(texts, 300)
    tokenizer.save_tiktoken(path)
    found.append(("tiktoken", path.read_bytes()))
    tokenizer.save_gpt2(path, second)
    found.append(("gpt2", path.read_bytes(), second.read_bytes()))
    return found


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """Changes, removes or adds values somewhere in the tree."""
    root = [json.loads(content)]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        node, parent, key = root, root, 0
        while isinstance(node, (dict, list)) and node and (node is root or rng.random() < 0.9):
            parent, key = (
                node,
                rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node)),
            )
            node = parent[key]
        value = copy.deepcopy(rng.choice([*VALUES, node, [node], [node] * 3]))
        action = rng.randrange(4)
        if action == 0 and parent is not root:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice([*"abĠ", str(key) + "x", "ab", "\ud801", ""])] = value
        elif action == 1:
            parent.insert(key, value)
        else:
            parent[key] = value
    if rng.random() < 0.01:
        depth = rng.choice([100, 100_000])
        return b"[" * depth + b"]" * depth
    return json.dumps(root[0] if root else None).encode()


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """Moves, doubles, joins and changes lines and the words in them."""
    lines = [line.split(b" ") for line in content.split(b"\n")]
    for _ in range(rng.choice([1, 1, 2, 4])):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        action = rng.randrange(6)
        if action == 0:
            lines[i], lines[j] = lines[j], lines[i]
        elif action == 1:
            lines.insert(i, list(lines[j]))
        elif action == 2 and len(lines) > 1:
            del lines[i]
        elif action == 3 and lines[i]:
            lines[i][rng.randrange(len(lines[i]))] = rng.choice(TOKENS)
        elif action == 4 and lines[i] and lines[j]:
            lines[i][-1] = lines[j][-1]
        else:
            lines[i].append(rng.choice(TOKENS))
    return rng.choice([b"\n", b"\n", b"\n", b"\r\n"]).join(map(b" ".join, lines))


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changes, removes and doubles bytes without regard to what they mean."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice([1, 1, 2, 8, 200]))
        action = rng.randrange(4)
        if action == 0:
            del data[i:j]
        elif action == 1:
            data[i:i] = data[i:j]
        elif action == 2:
            data[i:j] = bytes(
                rng.choice(b'\x00\xff\xed\xa0"\\{}[],:0-9 \n\r\tu') for _ in data[i:j]
            )
        elif i < len(data):
            data[i] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutated(rng: random.Random, kind: str, contents: tuple[bytes, ...]) -> list[bytes]:
    result = list(contents)
    i = rng.randrange(len(result))
    is_lines = kind == "tiktoken" or (kind == "gpt2" and i == 1)
    aware: Callable[[random.Random, bytes], bytes] = mutate_lines if is_lines else mutate_json
    result[i] = rng.choice([aware, aware, mutate_bytes])(rng, result[i])
    return result


def load(kind: str, paths: list[Path]) -> BPETokenizer | WordTokenizer:
    if kind == "tiktoken":
        return BPETokenizer.load_tiktoken(paths[0], pattern="cl100k", special_tokens=SPECIALS)
    if kind == "gpt2":
        return BPETokenizer.load_gpt2(paths[0], paths[1])
    return load_tokenizer(paths[0])


def check(tokenizer: BPETokenizer | WordTokenizer, folder: Path) -> None:
    """Raises `Failure` unless text and tokenizer survive being encoded and saved."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    if isinstance(tokenizer, BPETokenizer):
        for text, encoded in zip(TEXTS, ids, strict=True):
            if tokenizer.decode(encoded) not in (text, " " + text):
                raise Failure(f"{text!r} decodes to {tokenizer.decode(encoded)!r}")
    try:
        tokenizer.save(folder / "saved")
    except InputError:
        return
    if [load_again(tokenizer, folder / "saved").encode(text) for text in TEXTS] != ids:
        raise Failure("the saved tokenizer gives other ids")


def load_again(tokenizer, path):
    if isinstance(tokenizer, WordTokenizer):
        return WordTokenizer.load(path)
    return BPETokenizer.load(path, tokenizer.id_to_token(tokenizer.eos_id))


def outcome(kind: str, contents: list[bytes], folder: Path) -> str:
    """``loaded`` or ``refused``; raises whatever else happens."""
    paths = [folder / f"file{i}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    try:
        tokenizer = load(kind, paths)
    except InputError as error:
        message = str(error)
        if not any(path.name in message for path in paths) or "\n" in message:
            raise Failure(f"the message does not name the file in one line: {error}") from error
        return "refused"
    check(tokenizer, folder)
    return "loaded"


def fuzz(rng: random.Random, go_on: Callable[[int], bool], failures: Path) -> Counter[str]:
    """How many files of each kind were loaded and refused, while ``go_on`` of their number."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = seeds(folder)
        while go_on(counts.total()):
            kind, *contents = rng.choice(originals)
            files = mutated(rng, kind, tuple(contents))
            try:
                counts[f"{kind} {outcome(kind, files, folder)}"] += 1
            except BaseException:
                failures.mkdir(parents=True, exist_ok=True)
                for i, content in enumerate(files):
                    (failures / f"{kind}-{i}").write_bytes(content)
                (failures / f"{kind}-traceback").write_text(traceback.format_exc())
                raise
    return counts


@contextmanager
def limits():
    """A file that takes too much time or memory fails like any other."""
    import resource

    def too_slow(*_):
        raise TimeoutError(f"a small file took more than {MAX_SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, too_slow)
    yield


def main(seconds: float = 60, seed: int = 0) -> None:
    end = time.monotonic() + seconds

    def go_on(_: int) -> bool:
        signal.alarm(MAX_SECONDS)
        return time.monotonic() < end

    with limits():
        counts = fuzz(random.Random(seed), go_on, Path("build/fuzz"))
    signal.alarm(0)
    print(
        f"{counts.total():,} files: " + ", ".join(f"{n:,} {k}" for k, n in sorted(counts.items()))
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
