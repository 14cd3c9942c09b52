"""Learning merges: those of Hugging Face tokenizers, in bounded memory, with progress."""

import os
import string

import numpy as np
import pytest
from bpe_peers import merges_of, merges_of_hf, train_in_hf
from bpe_texts import FRAGMENTS, awkward, prose
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer, bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.bpe_counter import BPECounter
from tinylm.tokenizer.bpe_json import EOS
from tinylm.tokenizer.split_patterns import PATTERNS

C = compiled()
needs_extension = pytest.mark.skipif(C is None, reason="the compiled extension is not in use")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_frequency", [1, 2, 5])
def test_merges_are_those_of_tokenizers(seed, min_frequency):
    texts = [prose(seed, size=600), prose(seed + 100, size=100)]
    ours = BPETokenizer.train(texts, 900, min_frequency)
    theirs = train_in_hf(texts, 900, min_frequency)
    assert merges_of(ours) == merges_of_hf(theirs)
    assert ours.vocab == theirs.get_vocab()


@given(text=st.text(alphabet="ab ", max_size=60))
@settings(max_examples=150, deadline=None)
def test_ties_and_overlaps_are_merged_as_in_tokenizers(text):
    ours = BPETokenizer.train([text + "x"], 290, 1)
    assert merges_of(ours) == merges_of_hf(train_in_hf([text + "x"], 290, 1))


@needs_extension
@given(texts=st.lists(awkward, min_size=1, max_size=6))
@settings(max_examples=60)
def test_the_compiled_counter_is_the_specification(texts):
    counters = C.BPECounter("gpt2"), bpe_reference.BPECounter("gpt2")
    for counter in counters:
        counter.add(texts, False, 2)
    (pieces, counts), (expected_pieces, expected_counts) = (counter.items() for counter in counters)
    assert pieces == expected_pieces
    assert counts.tolist() == expected_counts.tolist()
    byte_ids = list(range(1, 257))
    ours, expected = (counter.train(byte_ids, 257, 330, 1).tolist() for counter in counters)
    assert ours == expected


def test_training_does_not_depend_on_threads_or_batches():
    texts = [prose(seed, size=20_000) for seed in range(8)]
    expected = merges_of(BPETokenizer.train(texts, 500, threads=1))
    assert merges_of(BPETokenizer.train(iter(texts), 500, threads=2)) == expected
    counter = BPETokenizer.counter()
    for text in reversed(texts):
        counter.add([text], threads=2)
    assert merges_of(BPETokenizer.from_counter(counter, 500)) == expected


def test_learning_again_from_one_counter_gives_the_same():
    counter = BPETokenizer.counter()
    counter.add([prose(1)])
    first = merges_of(BPETokenizer.from_counter(counter, 400))
    assert merges_of(BPETokenizer.from_counter(counter, 400)) == first
    counter.add([prose(2)])
    assert merges_of(BPETokenizer.from_counter(counter, 400)) != first


def test_a_small_corpus_gives_a_small_vocabulary():
    small = BPETokenizer.train(["ab ab"], vocab_size=1000)
    assert merges_of(small) == [("a", "b")]
    assert small.vocab_size == 258
    assert small.id_to_token(257) == "ab"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_of_each_pattern_are_those_of_tokenizers(pattern):
    texts = [prose(1, size=400), " ".join(FRAGMENTS) * 3]
    ours = BPETokenizer.train(texts, 700, pattern=pattern)
    theirs = train_in_hf(texts, 700, pattern=pattern)
    assert merges_of(ours) == merges_of_hf(theirs)


@given(texts=st.lists(awkward, min_size=1, max_size=8), min_frequency=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_of_awkward_text_are_those_of_tokenizers(pattern, texts, min_frequency):
    assume(not any(EOS in text for text in texts))  # tokenizers may merge it
    texts = ["x", *texts * 2]
    ours = BPETokenizer.train(texts, 400, min_frequency, pattern=pattern)
    theirs = train_in_hf(texts, 400, min_frequency, pattern)
    assert merges_of(ours) == merges_of_hf(theirs)
    assert ours.vocab == theirs.get_vocab()


# Special tokens


@pytest.mark.parametrize("names", [[EOS, "<pad>"], ["<unk>", "<s>", EOS], ["漢", "a b", EOS]])
def test_special_tokens_come_first_as_in_tokenizers(names):
    ours = BPETokenizer.train([prose(3)], 600, special_tokens=names)
    theirs = train_in_hf([prose(3)], 600, special_tokens=names)
    assert ours.vocab == theirs.get_vocab()
    assert [ours.id_to_token(i) for i in range(len(names))] == names
    assert ours.eos_id == names.index(EOS)
    assert ours.encode(f"x{names[0]}", allowed_special="all")[-1] == 0


def test_another_token_may_end_texts(tmp_path):
    ours = BPETokenizer.train([prose(3)], 300, special_tokens=["<a>", "</s>"], eos_token="</s>")
    assert ours.eos_id == 1
    ours.save(tmp_path / "tokenizer.json")
    assert BPETokenizer.load(tmp_path / "tokenizer.json", "</s>").vocab == ours.vocab


@pytest.mark.parametrize("python", [True, False])
def test_nothing_is_merged_into_the_name_of_a_special_token(monkeypatch, python):
    if python:
        monkeypatch.setenv("TINYLM_TOKENIZER", "python")
    texts = [f"{EOS} {EOS} kato kato"] * 5
    ours = BPETokenizer.train(texts, 400, 1, pattern="whitespace", special_tokens=[EOS, "kato"])
    assert len(ours.vocab) == ours.vocab_size
    assert not {0, 1} & set(ours.encode(texts[0]))
    assert ours.decode(ours.encode(texts[0])) == texts[0]
    assert "Ġ" + EOS in ours.vocab


def test_bad_settings():
    with pytest.raises(InputError, match=r"vocab_size is 257; it must be at least 258"):
        BPETokenizer.train(["a"], 257, special_tokens=[EOS, "<pad>"])
    for names, problem in (
        ([], "have no <|endoftext|>"),
        ("<pad>", "must be a list of names"),
        ([EOS, EOS], "twice"),
        ([EOS, ""], "is empty"),
        ([EOS, "a"], "the name of a byte"),
        ([EOS, "\ud800"], "a lone surrogate"),
    ):
        with pytest.raises(InputError, match=problem):
            BPETokenizer.train(["a"], special_tokens=names)
    with pytest.raises(InputError, match="memory is 0"):
        BPETokenizer.counter(memory=0)


# Bounded memory


def random_words(seed, words, letters=string.ascii_lowercase):
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list(letters), rng.integers(1, 30))) for _ in range(words))


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", [1, 100_000])
def test_counting_on_disk_changes_nothing(memory, threads):
    texts = [random_words(seed, 150) + prose(seed, 50) for seed in range(40)]
    expected, counter = BPETokenizer.counter(), BPETokenizer.counter(memory=memory)
    for first in range(0, len(texts), 8):
        expected.add(texts[first : first + 8], threads=threads)
        counter.add(texts[first : first + 8], threads=threads)
        if first == 16:
            assert len(counter) == len(expected)
    (pieces, counts), (expected_pieces, expected_counts) = counter.items(), expected.items()
    assert pieces == expected_pieces
    assert counts.tolist() == expected_counts.tolist()
    assert len(counter) == len(pieces)
    for _ in range(2):
        merges = counter.learn_merges(range(1, 257), 257, 700, 1)
        assert merges.tolist() == expected.learn_merges(range(1, 257), 257, 700, 1).tolist()


@needs_extension
@given(texts=st.lists(awkward, min_size=1, max_size=40), threads=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_text_is_counted_alike_on_disk(texts, threads):
    on_disk = BPETokenizer.counter(memory=1)
    expected = bpe_reference.BPECounter("gpt2")
    for text in texts:
        on_disk.add([text, *texts[:2]], threads)
        expected.add([text, *texts[:2]], False, 1)
    assert on_disk.items()[0] == expected.items()[0]
    assert on_disk.items()[1].tolist() == expected.items()[1].tolist()


@needs_extension
def test_counts_have_64_bits():
    counter = C.BPECounter("gpt2", 1)
    for _ in range(9):
        counter.add(["ab ab ab"], False, 1)
    piece, counts = counter.items()
    assert (piece, counts.tolist()) == ([b" ab", b"ab"], [18, 9])
    assert counts.dtype == np.int64


@needs_extension
@pytest.mark.skipif(os.name != "posix", reason="elsewhere open files have names")
def test_no_file_is_left(tmp_path):
    counter = BPECounter(memory=1, temporary_folder=tmp_path)

    def stop(*_):
        raise KeyError("stop")

    for seed in range(70):
        counter.add([random_words(seed, 100)])
        assert list(tmp_path.iterdir()) == []
    expected = counter.items()[0]
    with pytest.raises(KeyError):
        counter.learn_merges(range(1, 257), 257, 100_000, 1, progress=stop)
    assert counter.items()[0] == expected
    assert list(tmp_path.iterdir()) == []


@needs_extension
@pytest.mark.skipif(os.name != "posix", reason="needs a limit on files")
def test_no_room_on_disk_is_reported(tmp_path):
    import resource

    with pytest.raises(InputError, match=r"no such folder: .*missing"):
        BPECounter(temporary_folder=tmp_path / "missing")
    counter = BPECounter(memory=1, temporary_folder=tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            counter.add([random_words(seed, 300) for seed in range(10)], threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Progress


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, stage, done, total):
        self.calls.append((stage, done, total))

    def of(self, stage):
        return [call[1:] for call in self.calls if call[0] == stage]


@pytest.mark.parametrize("python", [True, False])
def test_progress_goes_up_to_all_there_is(monkeypatch, python):
    if python:
        monkeypatch.setenv("TINYLM_TOKENIZER", "python")
    monkeypatch.setattr("tinylm.tokenizer.batches.BATCH_CHARACTERS", 10_000)
    texts = [prose(seed, 300) for seed in range(30)]
    seen, characters = Recorder(), sum(map(len, texts))
    trained = BPETokenizer.train(texts, 400, progress=seen)
    counts, merges = seen.of("count"), seen.of("merge")
    assert counts == sorted(counts)
    assert len(counts) > 2
    assert counts[-1] == (characters, characters)
    assert merges == sorted(merges)
    assert merges[-1] == (400, 400)
    assert {total for _, total in counts} == {characters}
    assert merges_of(BPETokenizer.train(texts, 400)) == merges_of(trained)
    seen = Recorder()
    BPETokenizer.train(iter(texts), 400, progress=seen)
    assert seen.of("count")[-1] == (characters, None)


def test_a_vocabulary_that_stays_small_is_reported_as_it_is():
    seen = Recorder()
    BPETokenizer.train(["ab ab"], 1000, progress=seen)
    assert seen.of("merge")[-1] == (258, 1000)


@needs_extension
def test_a_callback_cannot_come_back_to_its_counter(monkeypatch):
    counter = BPETokenizer.counter()
    counter.add([random_words(seed, 3000) for seed in range(5)])
    monkeypatch.setattr("tinylm.tokenizer.progress.SECONDS_BETWEEN_CALLS", 0)
    with pytest.raises(RuntimeError, match="in the middle of another call"):
        counter.learn_merges(
            range(1, 257), 257, 200_000, 1, progress=lambda *_: len(counter) and None
        )
    assert len(counter) > 0
