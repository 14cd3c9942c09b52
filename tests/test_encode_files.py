"""Text files straight into token files: the ids of the whole texts, however they are cut."""

import numpy as np
import pytest
from bpe_texts import awkward, prose
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.data import encode_files
from tinylm.errors import InputError
from tinylm.tokenizer import BPETokenizer, WordTokenizer, bpe_reference
from tinylm.tokenizer.backend import compiled
from tinylm.tokenizer.cuts import parts_of
from tinylm.tokenizer.split_patterns import PATTERNS

C = compiled()
pretokenize = bpe_reference.pretokenize if C is None else C.bpe_pretokenize
# Places to cut, and what comes near to one.
around_cuts = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "\n", "\r", "/", "\n/", "!", "!\n", "'s", "\u3000", "\x1c", "Σ", "Σ."]
        ),
        st.sampled_from(
            ["a", "B", "1", "12345", "漢", "\u0301", " a", "x\ny", "。\n", "\xad", "\u2028"]
        ),
        awkward,
    ),
    max_size=30,
).map("".join)


def chunks_of(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@given(text=around_cuts, size=st.integers(1, 12), read=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_have_the_pieces_of_the_whole(pattern, text, size, read):
    parts = list(parts_of(chunks_of(text, read), size))
    assert "".join(parts) == text
    assert all(len(part) for part in parts)
    pieces = [piece for part in parts for piece in pretokenize(part, pattern)]
    assert pieces == pretokenize(text, pattern)


@given(text=around_cuts, size=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_parts_have_the_words_of_the_whole(text, size):
    counters = WordTokenizer.counter(), WordTokenizer.counter()
    counters[0].add(list(parts_of(chunks_of(text, size), size)))
    counters[1].add([text])
    (words, counts), (expected, expected_counts) = (counter.items() for counter in counters)
    assert words == expected
    assert counts.tolist() == expected_counts.tolist()


@given(text=around_cuts)
@settings(max_examples=100, deadline=None)
def test_prefixed_parts_begin_with_a_space(text):
    parts = list(parts_of(text, 4, prefixed=True))
    assert "".join(parts) == text
    assert all(part.startswith(" ") for part in parts[1:])


def test_parts_are_no_longer_than_they_must_be():
    assert max(map(len, parts_of(chunks_of(prose(0), 500), 1000))) < 2000
    assert list(parts_of(["a" * 5000, "b" * 5000 + " c"], 100)) == ["a" * 5000 + "b" * 5000, " c"]
    assert list(parts_of([], 100)) == list(parts_of([""], 100)) == []


@pytest.fixture(scope="module")
def tokenizers():
    texts = [prose(0), prose(1)]
    prefixed = BPETokenizer.train(texts, 500)
    object.__setattr__(prefixed._vocabulary, "add_prefix_space", True)
    return {
        "word": WordTokenizer.train(texts, 100),
        "bpe": BPETokenizer.train(texts, 500),
        "prefixed": type(prefixed)(prefixed._vocabulary),
    }


@pytest.mark.parametrize("kind", ["word", "bpe", "prefixed"])
@pytest.mark.parametrize("add_eos", [True, False])
def test_token_files_hold_the_ids_of_whole_files(tokenizers, kind, add_eos, tmp_path, monkeypatch):
    monkeypatch.setattr("tinylm.data.text_files.PART_CHARACTERS", 100)
    monkeypatch.setattr("tinylm.data.formats.READ_BYTES", 77)
    monkeypatch.setattr("tinylm.tokenizer.batches.BATCH_CHARACTERS", 1000)
    tokenizer, texts = tokenizers[kind], [prose(2), "", "\ufeffé Σ.", " \n", prose(3, 100)]
    paths = [tmp_path / f"{i}" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    calls = []
    tokens = encode_files(
        tokenizer,
        paths,
        tmp_path / "out" / "x.y.bin",
        add_eos=add_eos,
        progress=lambda *call: calls.append(call),
    )
    expected = tokenizer.encode_batch([text.removeprefix("\ufeff") for text in texts], add_eos)
    assert tokens.ids.tolist() == expected[0].tolist()
    assert tokens.offsets.tolist() == expected[1].tolist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.y.bin", "x.y.docs"]
    total = sum(path.stat().st_size for path in paths)
    assert calls[-1] == ("encode", total, total)


def test_large_vocabularies_take_four_bytes(tmp_path):
    (tmp_path / "text").write_text("a b")
    ranks = BPETokenizer.train(["a b"], 300)
    ranks.save_tiktoken(tmp_path / "ranks")
    wide = BPETokenizer.load_tiktoken(
        tmp_path / "ranks",
        pattern="gpt2",
        special_tokens={"<|endoftext|>": 0} | {f"<{i}>": i for i in range(300, 70_000)},
    )
    tokens = encode_files(wide, [tmp_path / "text"], tmp_path / "x.bin")
    assert tokens.dtype == np.dtype("<u4")
    assert tokens.ids.tolist() == wide.encode("a b", add_eos=True)


def test_what_cannot_be_encoded_leaves_nothing(tokenizers, tmp_path):
    bad, out = tmp_path / "bad", tmp_path / "out" / "x.bin"
    bad.write_bytes(b"ok\n" * 100 + b"\xff")

    def encode(paths=(bad,), out=out, **options):
        return encode_files(tokenizers["bpe"], paths, out, **options)

    with pytest.raises(InputError, match=r"bad: byte 300 \(line 101\) is not valid UTF-8"):
        encode()
    with pytest.raises(InputError, match=r"cannot read .*missing"):
        encode([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"must be called NAME\.bin"):
        encode(out=tmp_path / "x.txt")
    with pytest.raises(InputError, match="threads is 0"):
        encode(threads=0)
    with pytest.raises(InputError, match="errors is 'ignore'"):
        encode(errors="ignore")

    def stop(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        encode(errors="replace", progress=stop)
    assert not list(out.parent.iterdir())
    replaced = encode(errors="replace")
    assert tokenizers["bpe"].decode(replaced.ids[:-1]) == "ok\n" * 100 + "\ufffd"
