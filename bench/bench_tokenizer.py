"""Speed of the word tokenizer next to its Python specification, on the same text in one run.

    pytest bench/bench_tokenizer.py --benchmark-columns=min,median,rounds

The text is that of conftest.py. Every benchmark first shows that both give the same result.
"""

import numpy as np
import pytest

from tinylm.tokenizer import WordTokenizer, word_reference

_C = pytest.importorskip("tinylm._C")

IMPLEMENTATIONS = {"python": word_reference, "c++": _C}
VARIANTS = [("python", 1), ("c++", 1), ("c++", 2)]
VOCAB_SIZE = 10_000
each_variant = pytest.mark.parametrize(("name", "threads"), VARIANTS)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return WordTokenizer.train(texts, VOCAB_SIZE)


@pytest.fixture(scope="module")
def expected(tokenizer, texts):
    encoder = word_reference.WordEncoder(tokenizer.vocab)
    return encoder.encode_batch(texts, True, np.dtype(np.uint16))


@pytest.fixture
def measure(benchmark, report, name, threads):
    """Times a function over all the texts; the Python one less often, for it is slow."""

    def run(function):
        rounds = 2 if name == "python" else 10
        result = benchmark.pedantic(function, rounds=rounds, warmup_rounds=rounds // 10)
        report(side=name, threads=threads)
        return result

    return run


@each_variant
@pytest.mark.benchmark(group="word encode")
def test_encode(measure, name, threads, texts, tokenizer, expected):
    encoder = IMPLEMENTATIONS[name].WordEncoder(tokenizer.vocab)

    def encode():
        return encoder.encode_batch(texts, True, np.dtype(np.uint16), threads)

    assert all(map(np.array_equal, encode(), expected))
    assert all(map(np.array_equal, measure(encode), expected))


@each_variant
@pytest.mark.benchmark(group="word train")
def test_train(measure, name, threads, texts, tokenizer):
    def train():
        counter = IMPLEMENTATIONS[name].WordCounter()
        counter.add(texts, threads)
        return counter.most_common(VOCAB_SIZE - 2)

    words = list(tokenizer.vocab)[2:]
    assert train() == words
    assert measure(train) == words


@pytest.mark.parametrize(("name", "threads"), [("python", 1), ("tokenizer", 1)])
@pytest.mark.benchmark(group="word decode")
def test_decode(measure, name, threads, tokenizer, expected):
    ids, _ = expected
    pieces = list(tokenizer.vocab)

    def plain():
        return " ".join(pieces[i] if 0 <= i < len(pieces) else "<UNK>" for i in ids.tolist())

    decode = plain if name == "python" else lambda: tokenizer.decode(ids)
    assert decode() == plain()
    measure(decode)
