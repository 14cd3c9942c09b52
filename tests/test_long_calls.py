"""Long inputs: time in proportion to their length, Ctrl-C, other threads that go on."""

import random
import signal
import string
import threading
import time

import pytest
from bpe_texts import prose

from tinylm.tokenizer import BPETokenizer, WordTokenizer
from tinylm.tokenizer.backend import compiled

needs_extension = pytest.mark.skipif(
    compiled() is None, reason="the compiled extension is not in use"
)


def random_text(alphabet, size, seed=0):
    table = bytes(ord(alphabet[byte % len(alphabet)]) for byte in range(256))
    return random.Random(seed).randbytes(size).translate(table).decode()


@pytest.fixture(scope="module")
def tokenizer():
    """Knows runs of spaces and letters, pairs of letters, and numbers."""
    runs = " ".join([" " * 64, "a" * 64, "\n" * 64] * 40)
    letters = random_text(string.ascii_lowercase, 20_000, seed=1)
    numbers = random_text(string.digits, 20_000, seed=2)
    return BPETokenizer.train([runs, letters, numbers, prose(0)], vocab_size=3000)


RUNS = {
    "letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "letters": random_text(string.ascii_lowercase, 1_000_000),
    "digits": random_text(string.digits, 1_000_000),
    "apostrophes": "'s" * 500_000,
}


@needs_extension
@pytest.mark.parametrize("name", RUNS)
def test_a_million_characters_take_no_time(tokenizer, name):
    """Linear takes milliseconds, quadratic minutes."""
    start = time.process_time()
    ids, _ = tokenizer.encode_batch([RUNS[name]], threads=1)
    assert time.process_time() - start < 2
    assert tokenizer.decode(ids) == RUNS[name]


@needs_extension
def test_runs_become_their_longest_tokens(tokenizer):
    for name, char in (("letter", "a"), ("spaces", " ")):
        ids = tokenizer.encode(RUNS[name])
        longest = len(tokenizer.decode([ids[0]]))
        assert longest >= 16
        assert tokenizer.decode(ids[:1]) == char * longest
        assert len(ids) <= 1_000_000 // longest + longest


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lambda: random_text(string.digits, 10_000_000), id="10 MB of digits"),
        pytest.param(lambda: prose(1, 250_000) * 60, id="a document of 100 MB"),
    ],
)
def test_large_documents(tokenizer, text):
    text = text()
    start = time.process_time()
    ids, _ = tokenizer.encode_batch([text], threads=1)
    assert time.process_time() - start < 60
    assert tokenizer.decode_bytes(ids) == text.encode()


class Interrupt:
    """Ctrl-C a moment after the start; what it interrupts must end within a second of it."""

    def __init__(self, after):
        self._after = after

    def __enter__(self):
        self._raised = []
        # Where a shell has started us in the background, SIGINT is ignored.
        self._handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._timer = threading.Timer(self._after, self._raise)
        self._timer.start()
        return self

    def _raise(self):
        self._raised.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    def __exit__(self, kind, error, traceback):
        ended = time.monotonic()
        self._timer.cancel()
        self._timer.join()
        signal.signal(signal.SIGINT, self._handler)
        assert kind is KeyboardInterrupt, "it was over before Ctrl-C: the input is too small"
        assert ended - self._raised[0] < 1
        return True


@pytest.fixture(scope="module")
def endless():
    """One piece that takes seconds to merge."""
    return random_text(string.ascii_lowercase, 40_000_000)


@pytest.fixture(scope="module")
def endless_words():
    return " ".join(random_text(string.ascii_lowercase, 5, seed) for seed in range(2000)) + " "


@needs_extension
def test_ctrl_c_interrupts_encoding_one_long_piece(tokenizer, endless):
    with Interrupt(after=0.3):
        tokenizer.encode(endless)
    assert tokenizer.decode(tokenizer.encode(endless[:1000])) == endless[:1000]


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_interrupts_encoding_many_texts(tokenizer, endless, threads):
    texts = ["short", endless[:3_000_000], *[prose(2)] * 20, *[endless[:1_500_000]] * 40]
    with Interrupt(after=0.3):
        tokenizer.encode_batch(texts, threads=threads)
    assert tokenizer.encode_batch(texts[:1], threads=threads)[0].tolist() == tokenizer.encode(
        "short"
    )


@needs_extension
def test_ctrl_c_interrupts_counting_and_training(endless_words):
    counter = BPETokenizer.counter()
    with Interrupt(after=0.1):
        counter.add([endless_words * 50] * 2000)
    distinct = [
        " ".join(random_text(string.ascii_lowercase, 40, seed) for seed in range(first, 40_000, 7))
        for first in range(7)
    ]
    counter = BPETokenizer.counter()
    counter.add(distinct)
    with Interrupt(after=0.1):
        BPETokenizer.from_counter(counter, vocab_size=200_000, min_frequency=1)
    assert BPETokenizer.from_counter(counter, vocab_size=300).vocab_size == 300


@pytest.fixture(scope="module")
def many_pieces():
    """A million distinct ones."""
    text = random_text(string.ascii_lowercase + " " * 6, 6_000_000)
    counters = BPETokenizer.counter(), BPETokenizer.counter(memory=8_000_000)
    for counter in counters:
        counter.add([text])
    return counters


@needs_extension
@pytest.mark.parametrize("on_disk", [False, True])
def test_ctrl_c_interrupts_sorting_and_joining_pieces(many_pieces, on_disk):
    counter = many_pieces[on_disk]
    with Interrupt(after=0.02):
        counter.items()
    assert len(many_pieces[0]) == len(many_pieces[1]) > 300_000


@needs_extension
def test_an_exception_of_the_progress_callback_stops_training(endless_words):
    stopped = None

    def stop(stage, done, total):
        nonlocal stopped
        stopped = time.monotonic()
        assert (stage, total) == ("count", 200 * 50 * len(endless_words))
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        BPETokenizer.train([endless_words * 50] * 200, 1000, progress=stop)
    assert time.monotonic() - stopped < 1


@needs_extension
def test_ctrl_c_interrupts_words(endless_words):
    tokenizer = WordTokenizer.train([endless_words], 500)
    with Interrupt(after=0.1):
        tokenizer.encode_batch([endless_words * 1000] * 300)


@needs_extension
def test_other_threads_go_on_meanwhile(tokenizer, endless):
    count, done = 0, threading.Event()

    def tick():
        nonlocal count
        while not done.is_set():
            count += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before, start = count, time.monotonic()
    tokenizer.encode_batch([endless[:10_000_000]], threads=1)
    seconds = time.monotonic() - start
    ticks = count - before
    done.set()
    thread.join()
    assert seconds > 0.1, "too quick to tell"
    assert ticks > 100 * seconds  # of about 900
