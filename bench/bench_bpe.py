"""Byte-level BPE next to other tokenizers: encoding, decoding and training, on the same text.

    python -m pytest bench/bench_bpe.py --benchmark-json=bpe.json
    taskset -c 0 python -m pytest bench/bench_bpe.py --benchmark-json=bpe1.json    # one thread

The text is that of conftest.py; docs/tokenizer.md says how its tables and plots are made from this.
Nothing is timed before it has given the same ids as the others.

*Cold* is a new tokenizer and texts that no one has read before (some keep a text's UTF-8 with it);
*warm* is the same tokenizer and texts again. ``TINYLM_BENCH_MAX_MB`` (100) ends the sizes of
texts; 1000 goes on to a gigabyte. ``TINYLM_BENCH_RANKS`` is a folder with the rank files
``cl100k_base.tiktoken`` and ``o200k_base.tiktoken``, which cannot be had without a download.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from bpe_sides import SIDES, SLOW, THREADS, Vocabulary
from corpora import SCRIPTS, of_length, of_size
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS, to_alphabet

VOCAB_SIZE = 10_000
GPT2_PATTERN = (  # rustbpe knows no possessive quantifiers
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
ROUNDS, WARM_ROUNDS = 5, 10
INEXACT = {
    "tokie"
}  # its ids differ from those of tiktoken in a few places, so it is not timed there
MAX_MEGABYTES = float(os.environ.get("TINYLM_BENCH_MAX_MB", "100"))
SIZES = [m for m in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) if m <= MAX_MEGABYTES]
VOCABULARY_SIZES = [1000, 3000, 10_000, 30_000, 100_000, 200_000]
ENCODINGS = {"cl100k_base": ("cl100k", 100_257), "o200k_base": ("o200k", 199_999)}  # pattern, EOS
FAST = [name for name in SIDES if name in ("tinylm", "gigatoken")]

of_json = [name for name in SIDES if name != "quicktok"]
each_fast = pytest.mark.parametrize("name", FAST)


def train_vocabulary(texts, size, folder):
    """A tokenizer trained on the texts, in the files that sides read."""
    tokenizer = BPETokenizer.train(texts, size, min_frequency=1)
    files = Vocabulary("gpt2", folder / "tokenizer.json", folder / "ranks.tiktoken")
    tokenizer.save(files.json)
    tokenizer.save_tiktoken(files.ranks)
    return files


@pytest.fixture(scope="session")
def vocabulary(texts, tmp_path_factory):
    """Of a size, trained on the texts."""
    made = {}

    def of(size=VOCAB_SIZE):
        if size not in made:
            made[size] = train_vocabulary(texts, size, tmp_path_factory.mktemp(f"v{size}"))
        return made[size]

    return of


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    made = {}

    def of(encoding):
        if "TINYLM_BENCH_RANKS" not in os.environ:
            pytest.skip("TINYLM_BENCH_RANKS names no folder of rank files")
        if encoding not in made:
            ranks = Path(os.environ["TINYLM_BENCH_RANKS"]) / f"{encoding}.tiktoken"
            json = tmp_path_factory.mktemp(encoding) / "tokenizer.json"
            pattern, eos = ENCODINGS[encoding]
            BPETokenizer.load_tiktoken(ranks, pattern=pattern, special_tokens={EOS: eos}).save(json)
            made[encoding] = Vocabulary(pattern, json, ranks, encoding)
        return made[encoding]

    return of


def fresh(texts, side):
    """The same texts as objects that nothing is known of."""
    raw = [text.encode() for text in texts]
    return raw if getattr(side, "from_bytes", False) else [text.decode() for text in raw]


@pytest.fixture
def measure(benchmark, vocabulary):
    """Times the encoding of texts, cold or warm, and adds what is to be known of it."""

    def encode(side, texts):
        side.encode(texts)

    def run(name, texts, files=None, warm=False, **info):
        files = files or vocabulary()
        make = SIDES[name]
        side, seen = make(files), fresh(texts, make)
        ids = side.flat(side.encode(seen))
        ours = SIDES["tinylm"](files)
        expected = ours.flat(ours.encode(texts))
        if name in INEXACT and not np.array_equal(ids, expected):
            pytest.xfail(f"{name} gives other ids than all others here do")
        np.testing.assert_array_equal(ids, expected)
        rounds = 1 if name in SLOW else WARM_ROUNDS if warm else ROUNDS
        if warm:
            benchmark.pedantic(side.encode, args=(seen,), rounds=rounds)
        else:
            benchmark.pedantic(
                encode, setup=lambda: ((make(files), fresh(texts, make)), {}), rounds=rounds
            )
        if benchmark.stats is None:  # --benchmark-disable
            return
        size, seconds = sum(len(text.encode()) for text in texts), benchmark.stats.stats.median
        benchmark.extra_info.update(
            info, side=name, threads=THREADS, warm=warm, megabytes=size / 1e6,
            megabytes_per_second=round(size / 1e6 / seconds, 2),
            million_ids_per_second=round(len(ids) / 1e6 / seconds, 3),
        )  # fmt: skip

    return run


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", of_json)
@pytest.mark.benchmark(group="bpe encode")
def test_encode(measure, name, warm, texts):
    measure(name, texts, warm=warm)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.benchmark(group="bpe published")
def test_published(measure, encoding, name, warm, texts, published):
    measure(name, texts, published(encoding), warm, encoding=encoding)


@each_fast
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.benchmark(group="bpe script")
def test_script(measure, name, script, texts, tmp_path):
    """Each with a vocabulary trained on it."""
    there = SCRIPTS[script](texts)
    measure(name, there, train_vocabulary(there, VOCAB_SIZE, tmp_path), script=script)


@each_fast
@pytest.mark.parametrize("size", VOCABULARY_SIZES)
@pytest.mark.benchmark(group="bpe vocabulary")
def test_vocabulary(measure, name, size, texts, vocabulary):
    measure(name, texts, vocabulary(size), size=size)


@pytest.mark.parametrize("as_one", [False, True], ids=["documents", "one text"])
@each_fast
@pytest.mark.parametrize("megabytes", SIZES)
@pytest.mark.benchmark(group="bpe size")
def test_size(measure, name, megabytes, as_one, texts):
    """Cold; beyond the size of the text there is, of the same text again and again."""
    if as_one and megabytes > 100:
        pytest.skip("with four bytes a character, some copies of it fill a small machine")
    chosen = of_size(texts, megabytes)
    chosen = ["\n".join(chosen)] if as_one else chosen
    measure(name, chosen, size=megabytes, as_one=as_one)


@each_fast
@pytest.mark.parametrize("characters", [10, 100, 1000, 10_000, 100_000])
@pytest.mark.benchmark(group="bpe document length")
def test_document_length(measure, name, characters, texts):
    measure(name, of_length(of_size(texts, 10), characters), characters=characters)


PEAK = """
import json, re, sys
from pathlib import Path
from bpe_sides import SIDES, Vocabulary
name, folder, texts = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_bytes())
side = SIDES[name](Vocabulary("gpt2", folder / "tokenizer.json", folder / "ranks.tiktoken"))
texts = [text.encode() for text in texts] if getattr(side, "from_bytes", False) else texts
side.encode(texts[:1])  # imports what it needs
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
encoded = side.encode(texts)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", of_json)
@pytest.mark.benchmark(group="bpe memory")
def test_memory(benchmark, name, texts, vocabulary, tmp_path):
    """What encoding takes at its peak beyond the texts, what it returns among it."""
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])

    def run():
        command = [sys.executable, "-c", PEAK, name, str(vocabulary().json.parent), str(file)]
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        return float(done.stdout)

    peak = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(side=name, threads=THREADS, peak_mib=round(peak, 1))


@pytest.mark.parametrize("name", [n for n in of_json if "bytes" not in n])
@pytest.mark.benchmark(group="bpe decode")
def test_decode(benchmark, name, texts, vocabulary):
    """All ids, one array, at once."""
    ids = SIDES["tinylm"](vocabulary())
    ids = ids.flat(ids.encode(texts))
    side = SIDES[name](vocabulary())
    text = side.decode(ids)
    assert (text if isinstance(text, bytes) else text.encode()) == "".join(texts).encode()
    benchmark.pedantic(side.decode, args=(ids,), rounds=3 if name in SLOW else ROUNDS)
    if benchmark.stats is not None:
        benchmark.extra_info.update(
            side=name, megabytes_per_second=len(text) / 1e6 / benchmark.stats.stats.median
        )


def untrained_hf():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_in_hf(texts):
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = untrained_hf()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_in_tinylm(texts):
    return BPETokenizer.train(texts, VOCAB_SIZE, threads=THREADS)


def train_in_gigatoken(texts):
    # One buffer is its only way to take texts from memory; joining them is not timed.
    gigatoken = pytest.importorskip("gigatoken")
    separator = b"\x00\x01\x00"
    joined = separator.join(text.encode() for text in texts)
    return lambda _: gigatoken.train_bpe(joined, VOCAB_SIZE, [EOS], separator=separator)


def train_in_rustbpe(texts):
    rustbpe = pytest.importorskip("rustbpe")

    def train(texts):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), VOCAB_SIZE - 1, pattern=GPT2_PATTERN)
        return tokenizer

    return train


# What trains, made for the texts; and the tokens that it learnt.
TRAINERS = {
    "tinylm": (lambda _: train_in_tinylm, lambda result: result.vocab.keys()),
    "tokenizers": (lambda _: train_in_hf, lambda result: result.get_vocab().keys()),
    "gigatoken": (train_in_gigatoken, lambda result: map(to_alphabet, result[0].values())),
    "rustbpe": (
        train_in_rustbpe,
        lambda result: (to_alphabet(bytes(token)) for token, _ in result.get_mergeable_ranks()),
    ),
}


@pytest.mark.parametrize("side", TRAINERS)
@pytest.mark.benchmark(group="bpe train")
def test_train(benchmark, report, texts, side):
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if THREADS > 1 else "false"
    tokens = train_in_tinylm(texts).vocab.keys()
    make, tokens_of = TRAINERS[side]
    start = time.process_time()
    rounds = 5 if side == "tinylm" else 1
    result = benchmark.pedantic(make(texts), args=(texts,), rounds=rounds)
    seconds = (time.process_time() - start) / rounds
    # rustbpe breaks ties otherwise.
    different = set(tokens_of(result)) ^ tokens
    assert len(different - {EOS}) <= (VOCAB_SIZE // 100 if side == "rustbpe" else 0)
    report(side=side, threads=THREADS, cpu_seconds=seconds, different_tokens=len(different))
