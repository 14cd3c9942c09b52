"""What the word tokenizer takes for texts: strings, bytes, whatever lends bytes, files."""

import mmap
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_texts import _C, SPACES, TRAPS, assert_same, each_instruction_set, words

from tinylm.errors import InputError
from tinylm.tokenizer import WordTokenizer
from tinylm.tokenizer import word_reference as reference

# Whole characters, pieces of them, and bytes that are in none.
FRAGMENTS = [c.encode("utf-8", "surrogatepass") for c in [*TRAPS, *SPACES]]
fragments = st.one_of(
    st.sampled_from(FRAGMENTS),
    st.sampled_from(FRAGMENTS).map(lambda b: b[:-1]),
    st.binary(max_size=3),
    st.just(b"plain ascii words, "),
)
byte_texts = st.lists(fragments, max_size=40).map(b"".join)


@pytest.fixture(params=["c++", "python"])
def tokenizer(request, monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", request.param)
    return WordTokenizer(
        ["hello", "world", "привет", "中文", "ας", "\ufeffx", "a\x00b", "a\ufffdb"]
    )


TEXT = "Hello, WORLD! ПРИВЕТ 中文\u3000ΑΣ \ufeffx a\x00b 😀"
IDS = [2, 3, 4, 5, 6, 7, 8, 0, 1]


def forms(raw, path):
    """``raw`` in everything that lends bytes; the file is mapped read-only and for writing."""
    path.write_bytes(raw)
    array = bytearray(raw)
    with open(path, "r+b") as file:
        yield from (raw, array, memoryview(raw), memoryview(array)[:], np.frombuffer(raw, np.uint8))
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield mmap.mmap(file.fileno(), 0)


def test_every_form_of_a_text(tokenizer, tmp_path):
    assert tokenizer.encode(TEXT) == IDS
    for text in forms(TEXT.encode(), tmp_path / "text"):
        assert tokenizer.encode(text) == IDS
        ids, offsets = tokenizer.encode_batch([text, "hello", text], threads=2)
        assert ids.tolist() == [*IDS, 2, 1, *IDS]
        assert offsets.tolist() == [0, 9, 11, 20]
        assert WordTokenizer.train([text]).vocab == WordTokenizer.train([TEXT]).vocab


def test_files(tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(f"Hello\n{TEXT}".encode())
    with open(path, encoding="utf-8") as lines:
        assert tokenizer.encode_batch(lines)[0].tolist() == [2, 1, *IDS]
    with open(path, "rb") as lines:
        assert tokenizer.encode_batch(lines)[0].tolist() == [2, 1, *IDS]
    with open(path, "rb") as lines:
        assert WordTokenizer.train(lines).vocab == WordTokenizer.train(["Hello " + TEXT]).vocab
    assert tokenizer.encode_file(path).tolist() == [2, *IDS]
    assert tokenizer.encode_file(str(path), add_eos=False, threads=1).tolist() == [2, *IDS[:-1]]
    path.write_bytes(b"")
    assert tokenizer.encode_file(path).tolist() == [1]
    path.write_bytes(b"a\xff")
    with pytest.raises(InputError, match="byte 0xff at position 1"):
        tokenizer.encode_file(path)
    assert tokenizer.encode_file(path, errors="replace").tolist() == [0, 1]
    with pytest.raises(InputError, match=r"cannot read .*missing"):
        tokenizer.encode_file(tmp_path / "missing")


def test_bytes_that_are_no_utf8(tokenizer):
    texts = ["fine", b"fine", b"hello a\xe4\xb8b\xff", b"\xff"]
    message = "text 2 is not UTF-8: byte 0xe4 at position 7; pass errors='replace'"
    with pytest.raises(InputError, match=message):
        tokenizer.encode_batch(texts, threads=2)
    with pytest.raises(InputError, match=message):
        WordTokenizer.train(texts)
    with pytest.raises(InputError, match="text 0 is not UTF-8: byte 0x80 at position 0"):
        tokenizer.encode(b"\x80")
    with pytest.raises(InputError, match="errors is 'ignore'"):
        tokenizer.encode(b"a", errors="ignore")
    ids, _ = tokenizer.encode_batch([b"a\xe4\xb8b hello"], errors="replace")
    assert ids.tolist() == [9, 2, 1]
    assert "\ufffd" in WordTokenizer.train([b"\xff a"], errors="replace").vocab


def test_nothing_of_bad_texts_is_counted(tokenizer):
    counter = tokenizer.counter()
    with pytest.raises(ValueError, match="text 1"):
        counter.add(["a", b"\xff"])
    assert counter.items()[0] == []


@pytest.mark.parametrize(
    "text", [None, 1, ["a"], np.zeros(3, np.uint16), np.zeros((2, 2), np.uint8)]
)
def test_what_is_no_text(tokenizer, text):
    for call in (tokenizer.encode, lambda t: WordTokenizer.train(["a", t])):
        with pytest.raises(TypeError):
            call(text)


@pytest.mark.parametrize("one", ["a b", b"a b", bytearray(b"a"), memoryview(b"a")])
def test_one_text_is_no_list_of_texts(tokenizer, one):
    for call in (tokenizer.encode_batch, WordTokenizer.train):
        with pytest.raises(InputError, match="texts is one"):
            call(one)


@settings(max_examples=400, deadline=None)
@given(byte_texts, st.integers(1, 20))
def test_any_bytes_are_read_as_python_reads_them(raw, piece_length):
    text = raw.decode("utf-8", "replace")
    expected = reference.WordCounter()
    expected.add([text])
    for _ in each_instruction_set():
        found = words([raw], replace=True, piece_length=piece_length)
        assert list(found.items()) == list(zip(*map(list, expected.items()), strict=True))
    try:
        raw.decode()
        assert words([raw]) == found
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"position {error.start};"):
            words([raw], piece_length=piece_length)


def test_every_two_byte_and_many_longer_sequences():
    """Decoding with replacement, at every border of what is valid."""
    lead, edges = range(0x7E, 0x100), (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF)
    raws = [bytes([a, b, c, d]) for a in lead for b in edges for c in edges for d in edges]
    assert_same([raw.decode("utf-8", "replace") for raw in raws])
    raw = b" ".join(raws)
    assert words([raw], replace=True) == words([raw.decode("utf-8", "replace")])


def test_characters_as_bytes():
    """All of those with a case, and some of the rest."""
    codes = [*range(0x3400), *range(0x3400, 0xD800, 37), *range(0xE000, 0x110000, 37)]
    text = "".join(f"{chr(c)}Q AΣ{chr(c)} " for c in [*codes, *range(0xA640, 0xAC00)])
    text += "".join(f"{chr(c)}Q " for c in range(0x10400, 0x10600))
    assert words([text.encode()], 2) == words([text], 2)


def test_a_buffer_in_use_cannot_be_resized():
    text = bytearray(b"lorem ipsum " * 3_000_000)
    tokenizer = WordTokenizer(["lorem"])
    thread = threading.Thread(target=tokenizer.encode_batch, args=([text],), kwargs={"threads": 1})
    refused = False
    thread.start()
    while thread.is_alive() and not refused:
        try:
            text.append(0x20)
        except BufferError:
            refused = True
    thread.join()
    assert refused
    text.append(0x20)  # now it can


def test_bytes_that_change_meanwhile_do_no_harm():
    text = bytearray("中文 Σ é ".encode() * 100_000)
    tokenizer = WordTokenizer(["中文"])
    done = threading.Event()

    def change():
        place = 0
        while not done.is_set():
            text[place % len(text)] = place * 7 % 256
            place += 1013

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(10):
        ids, _ = tokenizer.encode_batch([text], threads=2, errors="replace")
        assert ids.max() <= 2
    done.set()
    thread.join()


def test_a_long_text_is_shared_by_threads():
    text = "Lorem ipsum, ΑΣ.Β dolor! 中文 " * 40_000
    tokenizer = WordTokenizer.train([text])
    for form in (text, text.encode()):
        expected = tokenizer.encode_batch([form], threads=1)[0]
        for threads in (2, 3, 8):
            ids = tokenizer.encode_batch([form], threads=threads)[0]
            np.testing.assert_array_equal(ids, expected)
    assert (
        _C.WordEncoder(tokenizer.vocab)
        .encode_batch([text], True, np.uint16, 4, piece_length=100)[0]
        .tolist()
        == expected.tolist()
    )
