"""Byte-level BPE: training, cold encoding and decoding, against tokenizers and tiktoken.

Usage: python -m pytest bench/bench_bpe.py

The text is that of conftest.py. A benchmark runs only once both sides have given the same ids.
"""

import os
import time
from itertools import pairwise

import pytest
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinylm.tokenizer.bpe import BPETokenizer
from tinylm.tokenizer.bpe_json import EOS, to_alphabet
from tinylm.tokenizer.split_patterns import REGEX

VOCAB_SIZE = 10_000
GPT2_PATTERN = (  # rustbpe knows no possessive quantifiers
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
ROUNDS = 3


@pytest.fixture(scope="session")
def trained(texts):
    return BPETokenizer.train(texts, VOCAB_SIZE)


@pytest.fixture(scope="session")
def file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tokenizer.json"
    trained.save(path)
    return path


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
    return BPETokenizer.train(texts, VOCAB_SIZE)


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


def new_tinylm(file):
    return BPETokenizer.load(file)


def new_tokenizers(file):
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def new_tiktoken(file):
    tokenizer = BPETokenizer.load(file)
    ranks = {tokenizer.decode_bytes([i]): i for i in range(1, tokenizer.vocab_size)}
    return tiktoken.Encoding(
        "bench", pat_str=REGEX["gpt2"], mergeable_ranks=ranks, special_tokens={EOS: 0}
    )


def encode_tinylm(tokenizer, texts, threads):
    return tokenizer.encode_batch(texts, threads=threads)


def encode_tokenizers(tokenizer, texts, threads):
    # Read at every call; more than one thread means all there are.
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
    return tokenizer.encode_batch_fast(texts, add_special_tokens=False)


def encode_tiktoken(tokenizer, texts, threads):
    if threads == 1:
        return [tokenizer.encode_ordinary(text) for text in texts]
    return tokenizer.encode_ordinary_batch(texts, num_threads=threads)


def lists_of(encoded):
    """Ids as one list per text, whichever side they come from."""
    if isinstance(encoded, tuple):
        ids, offsets = encoded
        return [ids[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    return [e if isinstance(e, list) else e.ids for e in encoded]


SIDES = {
    "tinylm": (new_tinylm, encode_tinylm),
    "tokenizers": (new_tokenizers, encode_tokenizers),
    "tiktoken": (new_tiktoken, encode_tiktoken),
}


@pytest.fixture(scope="session")
def expected(file, texts):
    return lists_of(encode_tinylm(new_tinylm(file), texts, 1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.benchmark(group="encode")
def test_encode_cold(benchmark, report, file, texts, expected, side, threads):
    new, encode = SIDES[side]
    assert lists_of(encode(new(file), texts, threads)) == expected
    benchmark.pedantic(encode, setup=lambda: ((new(file), texts, threads), {}), rounds=ROUNDS)
    report(threads=threads, side=side)


@pytest.mark.parametrize("side", TRAINERS)
@pytest.mark.benchmark(group="train")
def test_train(benchmark, report, texts, trained, side):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    make, tokens_of = TRAINERS[side]
    start = time.process_time()
    result = benchmark.pedantic(make(texts), args=(texts,), rounds=1)
    seconds = time.process_time() - start
    # rustbpe breaks ties otherwise.
    different = set(tokens_of(result)) ^ trained.vocab.keys()
    assert len(different - {EOS}) <= (VOCAB_SIZE // 100 if side == "rustbpe" else 0)
    report(side=side, cpu_seconds=round(seconds, 3), different_tokens=len(different))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.benchmark(group="decode")
def test_decode(benchmark, report, file, texts, expected, side):
    tokenizer = SIDES[side][0](file)
    decode = tokenizer.decode

    def decode_all():
        return [decode(ids) for ids in expected]

    assert decode_all() == texts
    benchmark.pedantic(decode_all, rounds=ROUNDS)
    report(side=side)
