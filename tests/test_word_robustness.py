"""The word tokenizer in the face of too little memory, Ctrl-C, many threads."""

import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_long_calls import Interrupt
from word_texts import _C

from tinylm.tokenizer import WordTokenizer


def run_with_little_memory(body):
    """Runs ``body`` where 400 MB more than after the imports may be had."""
    resource = pytest.importorskip("resource")
    assert resource
    script = (
        "import resource\nimport numpy as np\nfrom tinylm import _C\n"
        "from tinylm.tokenizer import WordTokenizer\n"
        "t = WordTokenizer(['a'])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)\n" + body
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(
    ("make", "call"),
    [
        ("text = 'x' * 150_000_000", "t.encode_batch([text], threads=1)"),
        ("text = 'x' * 150_000_000", "t.encode_batch([text, text], threads=2)"),
        ("text = 'x' * 150_000_000", "_C.WordCounter().add([text], 2)"),
        ("text = 'a ' * 90_000_000", "[t.encode_batch([text] * 4) for _ in range(2)]"),
        ("ids = np.full(45_000_000, 2, np.uint16)", "[t.decode(ids) for ids in [ids.repeat(3)]]"),
        ("", "t.decode(np.full(500_000, 2, np.uint16).repeat(400))"),
    ],
)
def test_too_little_memory_is_an_error(make, call):
    run_with_little_memory(
        f"{make}\n"
        f"try:\n    {call}\n"
        "except MemoryError:\n    pass\n"
        "else:\n    raise SystemExit('it was enough')\n"
        "assert t.decode(t.encode('a b')) == 'a <UNK> <EOS>'\n"
    )


def test_many_threads_share_a_tokenizer():
    generator = random.Random(0)
    words = [f"w{i}é" for i in range(500)]
    texts = [" ".join(generator.choices(words, k=3000)) for _ in range(12)]
    tokenizer = WordTokenizer(words[:300])
    expected = [tokenizer.encode(text) for text in texts]
    decoded = [tokenizer.decode(ids) for ids in expected]

    def work(seed):
        for i in random.Random(seed).choices(range(12), k=12):
            assert tokenizer.encode(texts[i].encode()) == expected[i]
            ids, offsets = tokenizer.encode_batch(texts, threads=2)
            assert ids[offsets[i] : offsets[i + 1]].tolist() == expected[i]
            assert tokenizer.decode_batch(ids, offsets, threads=2) == decoded
            assert pickle.loads(pickle.dumps(tokenizer)).decode(expected[i]) == decoded[i]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_other_threads_count_on_while_words_are_counted_and_decoded():
    tokenizer = WordTokenizer(["lorem", "ipsum"])
    text = "Lorem ipsum, dolor! " * 100_000
    ids = np.full(20_000_000, 2, np.uint16)
    count, done = 0, threading.Event()

    def tick():
        nonlocal count
        while not done.is_set():
            count += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    for call in (
        lambda: _C.WordCounter().add([text] * 30, 1),
        lambda: tokenizer.decode(ids),
    ):
        before, start = count, time.monotonic()
        while time.monotonic() - start < 0.2:
            call()
        assert count - before > 20
    done.set()
    thread.join()


def test_ctrl_c_interrupts_counting_and_decoding():
    texts = ["Lorem ipsum, dolor! " * 100_000] * 500
    with Interrupt(after=0.1):
        while True:
            _C.WordCounter().add(texts, 2)
    tokenizer = WordTokenizer(["x" * 3000])
    with Interrupt(after=0.1):
        while True:
            tokenizer.decode_batch(np.full(300_000, 2, np.uint16), np.arange(0, 300_001, 1000))
    assert tokenizer.decode([2, 0]) == "x" * 3000 + " <UNK>"
