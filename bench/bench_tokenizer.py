"""Speed of the word tokenizer next to others, on the same text in one run.

    pytest bench/bench_tokenizer.py --benchmark-columns=min,median,rounds

The text is that of conftest.py; docs/tokenizer.md says how its tables and plot are made from this.
Nothing is timed before it has given what the notebook's Python gives. On a machine that does other
things as well, ``--benchmark-timer=time.process_time`` counts processor time instead: that of all
threads together, so two threads then show what sharing costs, not what it gains.

``TINYLM_BENCH_MAX_MB`` (100) ends the sizes of texts; 1000 goes on to a gigabyte.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from corpora import SCRIPTS, of_length, of_size

from tinylm.tokenizer import WordTokenizer, word_reference

_C = pytest.importorskip("tinylm._C")

VOCAB_SIZE = 10_000
U16 = np.dtype(np.uint16)
MAX_MEGABYTES = float(os.environ.get("TINYLM_BENCH_MAX_MB", "100"))
SIZES = [m for m in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) if m <= MAX_MEGABYTES]
SEPARATORS = str.maketrans(dict.fromkeys(".,!?;:\"'()", " "))


class Notebook:
    """The notebook's Python: regular expression, list, dictionary."""

    def __init__(self, tokenizer):
        self._encoder = word_reference.WordEncoder(tokenizer.vocab)
        self._words = list(tokenizer.vocab)

    def encode(self, texts, threads):
        return self._encoder.encode_batch(texts, True, U16)[0]

    def train(self, texts, threads):
        counter = word_reference.WordCounter()
        counter.add(texts)
        return counter.most_common(VOCAB_SIZE - 2)

    def decode(self, ids, threads):
        words = self._words
        return " ".join([words[i] if 0 <= i < len(words) else "<UNK>" for i in ids.tolist()])


class Split(Notebook):
    """Python without regular expressions: str.translate and str.split give the same words."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self._get = tokenizer.vocab.get

    def encode(self, texts, threads):
        ids = []
        for text in texts:
            words = text.lower().translate(SEPARATORS).split()
            ids.extend([self._get(word, 0) for word in words])
            ids.append(1)
        return np.array(ids, U16)

    def decode(self, ids, threads):
        return " ".join(map(self._words.__getitem__, ids.tolist()))


class Tinylm:
    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts, threads):
        return self._tokenizer.encode_batch(texts, threads=threads)[0]

    def train(self, texts, threads):
        counter = _C.WordCounter()
        counter.add(texts, threads)
        return counter.most_common(VOCAB_SIZE - 2)

    def decode(self, ids, threads):
        return self._tokenizer.decode(ids, threads=threads)


SIDES = {"notebook": Notebook, "split": Split, "tinylm": Tinylm}
EACH = [("notebook", 1), ("split", 1), ("tinylm", 1), ("tinylm", 2)]
each_side = pytest.mark.parametrize(("name", "threads"), EACH)
each_trainer = pytest.mark.parametrize(("name", "threads"), [EACH[0], *EACH[2:]])
each_script = pytest.mark.parametrize("script", SCRIPTS)
ours = pytest.mark.parametrize("threads", [1, 2])


@pytest.fixture(scope="module")
def scripts(texts):
    """For each script its texts, the tokenizer trained on them, and the ids to be had."""
    made = {}

    def of(script):
        if script not in made:
            there = SCRIPTS[script](texts)
            tokenizer = WordTokenizer.train(there, VOCAB_SIZE)
            made[script] = there, tokenizer, Notebook(tokenizer).encode(there, 1)
        return made[script]

    return of


@pytest.fixture
def measure(benchmark):
    """Times a function, the slow ones less often, and adds what is to be known of it."""

    def run(function, texts, ids, slow=False, **info):
        rounds = 2 if slow else 10
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=0 if slow else 1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        size, seconds = sum(len(text.encode()) for text in texts), benchmark.stats.stats.min
        benchmark.extra_info.update(
            info, megabytes=size / 1e6, megabytes_per_second=round(size / 1e6 / seconds, 2),
            million_ids_per_second=round(ids / 1e6 / seconds, 3),
        )  # fmt: skip

    return run


@each_side
@each_script
@pytest.mark.benchmark(group="word encode")
def test_encode(measure, name, threads, script, scripts):
    texts, tokenizer, expected = scripts(script)
    side = SIDES[name](tokenizer)
    np.testing.assert_array_equal(side.encode(texts, threads), expected)
    measure(lambda: side.encode(texts, threads), texts, len(expected), name != "tinylm",
            side=name, threads=threads, script=script)  # fmt: skip


@ours
@each_script
@pytest.mark.benchmark(group="word encode")
def test_encode_bytes(measure, threads, script, scripts):
    texts, tokenizer, expected = scripts(script)
    raws, side = [text.encode() for text in texts], Tinylm(tokenizer)
    np.testing.assert_array_equal(side.encode(raws, threads), expected)
    measure(lambda: side.encode(raws, threads), texts, len(expected),
            side="tinylm from bytes", threads=threads, script=script)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.benchmark(group="word encode")
def test_encode_by_tokenizers(measure, threads, scripts, tmp_path):
    """Of Hugging Face; texts whose ids differ there (final sigma, ``<UNK>``) are left out."""
    tokenizers = pytest.importorskip("tokenizers")
    texts, tokenizer, _ = scripts("english")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    encoded = theirs.encode_batch(texts)
    same = [text for text, e in zip(texts, encoded, strict=True) if tokenizer.encode(text) == e.ids]
    assert len(same) >= 0.98 * len(texts)
    ids = sum(len(e.ids) for e in encoded)
    measure(lambda: theirs.encode_batch(same), same, ids, slow=True, side="tokenizers",
            threads=threads, script="english", left_out=len(texts) - len(same))  # fmt: skip


@each_trainer
@each_script
@pytest.mark.benchmark(group="word train")
def test_train(measure, name, threads, script, scripts):
    texts, tokenizer, expected = scripts(script)
    side = SIDES[name](tokenizer)
    assert side.train(texts, threads) == list(tokenizer.vocab)[2:]
    measure(lambda: side.train(texts, threads), texts, len(expected), name != "tinylm",
            side=name, threads=threads, script=script)  # fmt: skip


@each_side
@each_script
@pytest.mark.benchmark(group="word decode")
def test_decode(measure, name, threads, script, scripts):
    _, tokenizer, ids = scripts(script)
    side = SIDES[name](tokenizer)
    text = Notebook(tokenizer).decode(ids, 1)
    assert side.decode(ids, threads) == text
    measure(lambda: side.decode(ids, threads), [text], len(ids), name != "tinylm",
            side=name, threads=threads, script=script)  # fmt: skip


@pytest.mark.parametrize("as_one", [False, True], ids=["documents", "one text"])
@ours
@pytest.mark.parametrize("megabytes", SIZES)
@pytest.mark.benchmark(group="word size")
def test_size(measure, megabytes, threads, as_one, scripts):
    texts, tokenizer, _ = scripts("english")
    chosen = of_size(texts, megabytes)
    chosen = ["\n".join(chosen)] if as_one else chosen
    ids = tokenizer.encode_batch(chosen, threads=threads)[0]
    if megabytes <= 10:
        np.testing.assert_array_equal(Notebook(tokenizer).encode(chosen, 1), ids)
    measure(lambda: tokenizer.encode_batch(chosen, threads=threads), chosen, len(ids),
            size=megabytes, threads=threads, as_one=as_one)  # fmt: skip


@ours
@pytest.mark.parametrize("characters", [10, 100, 1000, 10_000, 100_000])
@pytest.mark.benchmark(group="word document length")
def test_document_length(measure, characters, threads, scripts):
    texts, tokenizer, _ = scripts("english")
    chosen = of_length(of_size(texts, 5), characters)
    ids = tokenizer.encode_batch(chosen, threads=threads)[0]
    np.testing.assert_array_equal(Notebook(tokenizer).encode(chosen, 1), ids)
    measure(lambda: tokenizer.encode_batch(chosen, threads=threads), chosen, len(ids),
            characters=characters, threads=threads)  # fmt: skip


PEAK = """
import re, sys
from tinylm.tokenizer import WordTokenizer
text = "The quick brown fox, jumping over the lazy dog: %d. " % 7
text *= int(float(sys.argv[1]) * 1e6) // len(text)
tokenizer = WordTokenizer("the quick brown fox dog".split())
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
ids = tokenizer.encode_batch([text], threads=2)[0]
print(memory("VmHWM") - before, ids.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("megabytes", [m for m in SIZES if m >= 10])
@pytest.mark.benchmark(group="word memory")
def test_memory(benchmark, megabytes):
    """What a call takes at its peak, beyond its text: hardly more than the ids it gives."""

    def run():
        command = [sys.executable, "-c", PEAK, str(megabytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return map(float, done.stdout.split())

    peak, ids = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(megabytes=megabytes, peak_mib=peak, ids_mib=ids)
    assert ids < peak < 2 * ids + 64
