"""Counting and encoding by the compiled word tokenizer, next to its specification."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from word_texts import _C

from tinylm.tokenizer import WordTokenizer
from tinylm.tokenizer import word_reference as reference


def test_ties_go_to_the_first_appearance():
    texts = ["b a c", "a b c d", "e d"]
    for threads in (1, 2, 3):
        counter = _C.WordCounter()
        counter.add(texts[:2], threads)
        counter.add(texts[2:], threads)
        assert counter.most_common(9) == ["b", "a", "c", "d", "e"]
        assert counter.most_common(2) == ["b", "a"]
        assert counter.items()[0] == ["b", "a", "c", "d", "e"]
        counter.add(["e e e"], threads)
        assert counter.most_common(1) == ["e"]
        assert counter.items()[0] == ["b", "a", "c", "d", "e"]


def test_threads_do_not_change_the_counts():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"W{n}" for n in rng.zipf(1.2, 3000) % 5000) for _ in range(80)]
    expected = reference.WordCounter()
    expected.add(texts)
    for threads in (1, 2, 5):
        counter = _C.WordCounter()
        for start in range(0, len(texts), 30):
            counter.add(texts[start : start + 30], threads)
        for n in (0, 1, 100, 10**6):
            assert counter.most_common(n) == expected.most_common(n)
        found, counts = counter.items()
        want, want_counts = expected.items()
        assert found == want
        np.testing.assert_array_equal(counts, want_counts)
        assert counts.dtype == np.int64


def test_one_counter_in_several_threads():
    counter = _C.WordCounter()
    texts = ["x y z " * 1000]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: counter.add(texts, 2), range(20)))
    assert dict(zip(*counter.items(), strict=True)) == dict.fromkeys("xyz", 20_000)


# ---- Encoding -----------------------------------------------------------------------------------


def test_batch_equals_single_and_threads_do_not_change_it():
    texts = [f"One {i}, two. UNKNOWN{i}! " * (i % 70) for i in range(300)] + ["", "x" * 99]
    tokenizer = WordTokenizer.train(texts[:150])
    single = [tokenizer.encode(text) for text in texts]
    for threads in (None, 1, 2, 7, 10**5):
        ids, offsets = tokenizer.encode_batch(texts, threads=threads)
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == single
    without = [tokenizer.encode(text, add_eos=False) for text in texts]
    assert single == [[*ids, 1] for ids in without]


def test_empty_batches():
    tokenizer = WordTokenizer(["a"])
    for texts, eos, ids, offsets in (
        ([], True, [], [0]),
        (["", ""], True, [1, 1], [0, 1, 2]),
        (["", " "], False, [], [0, 0, 0]),
    ):
        got = tokenizer.encode_batch(texts, add_eos=eos)
        assert [a.tolist() for a in got] == [ids, offsets]


@pytest.mark.parametrize(
    ("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32), (3, np.uint16)]
)
def test_ids_are_16_bits_where_they_fit(size, dtype):
    tokenizer = WordTokenizer([f"w{i}" for i in range(2, size)])
    ids, offsets = tokenizer.encode_batch([f"w{size - 1} w2 no"])
    assert (ids.dtype, offsets.dtype) == (dtype, np.int64)
    assert ids.tolist() == [size - 1, 2, 0, 1]
    assert ids.flags.owndata
    assert ids.flags.writeable


def test_the_compiled_encoder_refuses_what_it_cannot_do():
    encoder = _C.WordEncoder({"<UNK>": 0, "<EOS>": 1, "a": 70_000})
    with pytest.raises(OverflowError, match="70000"):
        encoder.encode_batch(["a"], True, np.uint16)
    with pytest.raises(TypeError, match="float32"):
        encoder.encode_batch(["a"], True, np.float32)
    with pytest.raises(TypeError, match=r"texts\[1\] is of type int"):
        encoder.encode_batch(["a", 1], True, np.int32)
    with pytest.raises(TypeError, match=r"texts\[0\] is of type NoneType"):
        _C.WordCounter().add([None])


def test_str_subclasses_and_any_iterable():
    class Text(str):
        __slots__ = ()

    tokenizer = WordTokenizer(["a", "b"])
    assert tokenizer.encode(Text("B a")) == [3, 2, 1]
    ids, _ = tokenizer.encode_batch(text for text in ("A", "b"))
    assert ids.tolist() == [2, 1, 3, 1]


def test_other_threads_run_meanwhile():
    """With the GIL held, this thread would wait once for nearly all of the time."""
    tokenizer = WordTokenizer(["lorem", "ipsum"])
    texts = ["Lorem ipsum, dolor! " * 100_000] * 30
    longest_wait = 0.0
    with ThreadPoolExecutor(1) as pool:
        start = last = time.perf_counter()
        job = pool.submit(tokenizer.encode_batch, texts, threads=1)
        while not job.done():
            now = time.perf_counter()
            longest_wait = max(longest_wait, now - last)
            last = now
        took = time.perf_counter() - start
    assert longest_wait < took / 2


def test_encoding_after_fork_and_in_threads():
    tokenizer = WordTokenizer(["a", "b"])
    texts = ["A b " * 100_000] * 4
    expected = tokenizer.encode_batch(texts, threads=2)[0]
    with ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(lambda _: tokenizer.encode_batch(texts, threads=2), range(8)):
            np.testing.assert_array_equal(ids, expected)
    if not hasattr(os, "fork"):
        return
    script = (
        "import os; from tinylm.tokenizer import WordTokenizer\n"
        "t = WordTokenizer(['a']); texts = ['a ' * 50_000] * 8\n"
        "n = t.encode_batch(texts, threads=2)[0].sum()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(int(t.encode_batch(texts, threads=2)[0].sum() != n))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_threads_propagate_errors_and_end():
    """A text that is no str is found before any thread starts, and nothing is left running."""
    before = threading.active_count()
    with pytest.raises(TypeError):
        _C.WordCounter().add(["a " * 100_000, None], 4)
    assert threading.active_count() == before
