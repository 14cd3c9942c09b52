"""From a corpus to a data folder: its content and figures, and what is wrong with a corpus."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import contents, error_of, make, some_texts, word_config, write_jsonl

from tinylm.data import DataConfig, Dataset, encode_documents, prepare
from tinylm.data import encode as encode_module
from tinylm.data.overlap import CHUNK_TOKENS, measure_overlap
from tinylm.data.splits import is_validation
from tinylm.errors import InputError
from tinylm.spelling import SpellingModel
from tinylm.tokenizer.word_reference import split_words


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "corpus.jsonl", [*some_texts(), "", " \n\u2028"])


def split_of(texts: list[str], fraction: float = 0.05) -> dict[str, list[str]]:
    sides: dict[str, list[str]] = {"train": [], "valid": []}
    for text in texts:
        held_out = is_validation(text.encode("utf-8", "surrogatepass"), fraction)
        sides["valid" if held_out else "train"].append(text)
    return sides


# --- splits ------------------------------------------------------------------------------------


def test_split_is_the_same_everywhere() -> None:
    texts = [f"document {i}" for i in range(1000)]
    held_out = [i for i, text in enumerate(texts) if is_validation(text.encode(), 0.05)]
    # Written down once: another list would silently mix training and validation of old runs.
    assert held_out[:8] == [40, 70, 100, 118, 123, 129, 148, 163]
    assert 30 <= len(held_out) <= 70
    wider = [i for i, text in enumerate(texts) if is_validation(text.encode(), 0.2)]
    assert set(held_out) < set(wider)


def test_duplicates_never_straddle(tmp_path: Path) -> None:
    texts = some_texts(200) * 3
    data = make(word_config(write_jsonl(tmp_path / "a.jsonl", texts)), tmp_path)
    train = {data.train.document(i).tobytes() for i in range(data.train.documents)}
    sides = split_of(texts)
    assert data.train.documents == len(sides["train"])
    assert data.valid.documents == len(sides["valid"]) > 0
    assert not set(sides["train"]) & set(sides["valid"])
    assert train


# --- content -----------------------------------------------------------------------------------


def test_documents_and_figures(corpus: str, tmp_path: Path) -> None:
    data = make(word_config(corpus), tmp_path)
    spelling = SpellingModel.load(data.path / "spelling.safetensors")
    vocab = data.tokenizer.vocab
    for name, texts in split_of(some_texts()).items():
        tokens = data.splits[name]
        expected = [data.tokenizer.encode(text) for text in texts]
        assert [tokens.document(i).tolist() for i in range(tokens.documents)] == expected
        words = [split_words(text) for text in texts]
        unknown = [word for split in words for word in split if word not in vocab]
        meta = dict(data.meta["splits"][name])
        assert meta.pop("unk_bits") == pytest.approx(spelling.bits(unknown).sum())
        assert meta == {
            "documents": len(texts),
            "tokens": len(tokens),
            "text_bytes": sum(len(t.encode("utf-8", "surrogatepass")) for t in texts),
            "normalised_bytes": sum(
                len(" ".join(split).encode("utf-8", "surrogatepass")) for split in words
            ),
            "unk_tokens": len(unknown),
        }
        assert len(tokens) == sum(map(len, expected))
        assert unknown
    assert data.train.dtype == np.uint16
    assert data.meta["vocab_size"] == data.tokenizer.vocab_size == 20


def test_tokenizer_sees_the_training_split_only(tmp_path: Path) -> None:
    texts = [f"common{i} only{i}" for i in range(200)]
    data = make(word_config(write_jsonl(tmp_path / "a.jsonl", texts), vocab_size=10_000), tmp_path)
    sides = split_of(texts)
    assert set(data.tokenizer.vocab) - {"<UNK>", "<EOS>"} == set(" ".join(sides["train"]).split())
    assert data.meta["splits"]["train"]["unk_tokens"] == 0
    assert data.meta["splits"]["valid"]["unk_tokens"] == 2 * len(sides["valid"])


def test_one_stream_ends_once(corpus: str, tmp_path: Path) -> None:
    data = make(word_config(corpus, document_eos=False), tmp_path)
    eos = data.tokenizer.eos_id
    for name, texts in split_of(some_texts()).items():
        ids = [i for text in texts for i in data.tokenizer.encode(text, add_eos=False)]
        assert data.splits[name].ids.tolist() == [*ids, eos]
        assert data.splits[name].offsets[-1] == len(ids) + 1
        words = [" ".join(split_words(text)) for text in texts]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in words)
        assert data.meta["splits"][name]["normalised_bytes"] == size


def test_second_source_is_the_validation_split(corpus: str, tmp_path: Path) -> None:
    texts = ["one two", "three"]
    valid = write_jsonl(tmp_path / "valid.jsonl", texts)
    data = make(word_config(corpus, valid=valid), tmp_path)
    assert data.train.documents == len(some_texts())
    expected = [data.tokenizer.encode(text) for text in texts]
    assert [data.valid.document(i).tolist() for i in range(2)] == expected


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    texts = [
        " ".join(f"w{i}" for i in range(start, start + 700)) for start in range(0, 70_000, 700)
    ]
    config = word_config(write_jsonl(tmp_path / "a.jsonl", texts * 2), vocab_size=100_000)
    data = make(config, tmp_path)
    assert data.tokenizer.vocab_size > 1 << 16
    assert data.train.dtype == np.uint32
    assert int(data.train.ids.max()) > 1 << 16
    assert data.train.document(0).tolist() == data.tokenizer.encode(split_of(texts)["train"][0])


def test_batches_do_not_change_the_result(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(word_config(corpus), tmp_path / "a").path)
    monkeypatch.setattr(encode_module, "_BATCH_DOCUMENTS", 7)
    assert contents(make(word_config(corpus), tmp_path / "b").path) == whole


def test_ready_tokenizer(corpus: str, tmp_path: Path) -> None:
    first = make(word_config(corpus), tmp_path)
    path = first.path / "tokenizer.json"
    other = write_jsonl(tmp_path / "other.jsonl", some_texts(seed=1))
    data = make(DataConfig(data=other, tokenizer=str(path)), tmp_path)
    assert data.tokenizer.vocab == first.tokenizer.vocab
    assert data.meta["splits"]["valid"]["unk_bits"] > 0
    again = make(DataConfig(data=corpus, tokenizer=str(path)), tmp_path)
    assert again.path != first.path
    assert again.meta["splits"] == first.meta["splits"]
    missing = DataConfig(data=corpus, tokenizer=str(tmp_path / "missing.json"))
    assert "no such file" in error_of(lambda: make(missing, tmp_path))


def test_encode_documents(corpus: str, tmp_path: Path) -> None:
    data = make(word_config(corpus), tmp_path)
    texts = some_texts(50, seed=2)
    other = write_jsonl(tmp_path / "other.jsonl", texts)

    def encode(**options: Any) -> Dataset:
        tokenizer = data.path / "tokenizer.json"
        return encode_documents(other, tokenizer, cache_dir=tmp_path, progress=False, **options)

    spelling = data.path / "spelling.safetensors"
    plain, full = encode(), encode(spelling=spelling, train=data.train)
    assert plain.path != full.path
    for encoded in (plain, full):
        expected = [data.tokenizer.encode(text) for text in texts]
        assert [encoded.valid.document(i).tolist() for i in range(len(texts))] == expected
    unknown = [w for t in texts for w in split_words(t) if w not in data.tokenizer.vocab]
    bits = SpellingModel.load(spelling).bits(unknown).sum()
    assert full.meta["splits"]["valid"]["unk_bits"] == pytest.approx(bits)
    assert plain.meta["splits"]["valid"]["unk_bits"] is None
    assert full.meta["overlap"]["share"] is not None
    assert plain.meta["overlap"] is None
    assert "no train split" in error_of(lambda: plain.train)
    same = encode_documents(
        corpus, data.path / "tokenizer.json", train=data.train, cache_dir=tmp_path, progress=False
    )
    # Training text itself, and a few chunks that differ in where documents are held out.
    assert same.meta["overlap"]["share"] > 0.5


@pytest.mark.parametrize("document_eos", [True, False])
def test_bpe(corpus: str, tmp_path: Path, document_eos: bool) -> None:
    config = DataConfig(data=corpus, vocab_size=300, errors="replace", document_eos=document_eos)
    data = make(config, tmp_path)
    assert data.tokenizer.vocab_size == 300
    eos = data.tokenizer.eos_id
    texts = [text.replace("\ud800", "\ufffd") for text in some_texts()]
    for name, side in split_of(texts).items():
        tokens = data.splits[name]
        decoded = data.tokenizer.decode(i for i in tokens.ids.tolist() if i != eos)
        assert decoded == "".join(side)
        assert int((tokens.ids == eos).sum()) == (len(side) if document_eos else 1)
        size = sum(len(text.encode()) for text in side)
        assert data.meta["splits"][name] == {
            "documents": len(side),
            "tokens": len(tokens),
            "text_bytes": size,
            "normalised_bytes": size,
            "unk_tokens": 0,
            "unk_bits": None,
        }
    assert not (data.path / "spelling.safetensors").exists()
    again = make(
        DataConfig(data=corpus, errors="replace", tokenizer=str(data.path / "tokenizer.json")),
        tmp_path,
    )
    assert again.tokenizer.vocab == data.tokenizer.vocab


def test_bpe_names_the_record_it_cannot_encode(corpus: str, tmp_path: Path) -> None:
    message = error_of(lambda: make(DataConfig(data=corpus), tmp_path))
    assert "corpus.jsonl, line 302: character 4" in message


# --- overlap -----------------------------------------------------------------------------------


def brute_force_overlap(valid: np.ndarray, train: np.ndarray) -> tuple[int, int]:
    windows = {tuple(train[i : i + 32]) for i in range(len(train) - 31)}
    chunks = [tuple(valid[i : i + 32]) for i in range(0, len(valid) - 31, 32)]
    return len(chunks), sum(chunk in windows for chunk in chunks)


@pytest.mark.parametrize("lengths", [(0, 500), (31, 500), (32, 31), (32, 32), (700, 9000)])
def test_overlap_equals_brute_force(
    lengths: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    valid, train = (rng.integers(0, 3, n).astype(np.uint16) for n in lengths)
    for start in range(0, len(valid) - 32, 96):
        at = int(rng.integers(0, max(len(train) - 32, 1)))
        train[at : at + 32] = valid[start : start + 32][: len(train) - at]
    expected = brute_force_overlap(valid, train)
    assert lengths != (700, 9000) or 4 <= expected[1] <= 15
    train.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", np.uint16, "r")
    for pieces in (1 << 20, CHUNK_TOKENS, 3 * CHUNK_TOKENS):
        monkeypatch.setattr("tinylm.data.overlap._WINDOWS_AT_ONCE", pieces)
        for ids in (train, mapped, np.memmap(tmp_path / "ids", np.uint16, "r")[:]):
            overlap = measure_overlap(valid, ids)
            assert (overlap.chunks, overlap.found) == expected
    offset = measure_overlap(valid, mapped[8:])
    assert (offset.chunks, offset.found) == brute_force_overlap(valid, train[8:])
    assert (overlap.share is None) == (lengths[0] < 32)


@given(st.integers(0, 31), st.integers(1, 65_535))
def test_one_other_token_is_no_overlap(place: int, change: int) -> None:
    train = np.arange(1000, dtype=np.uint16)
    valid = train[100:132].copy()
    assert measure_overlap(valid, train).found == 1
    valid[place] = (int(valid[place]) + change) % 65_536
    assert measure_overlap(valid, train).found == 0


# --- errors and manners ------------------------------------------------------------------------


def test_splits_without_documents(tmp_path: Path) -> None:
    def message(texts: list[str], **changes: Any) -> str:
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        return error_of(lambda: make(word_config(path, **changes), tmp_path))

    assert "the corpus is empty" in message([])
    assert "the corpus is empty" in message(["", " \n"])
    told = message(["one document"] * 3)
    assert "none of the 3 documents falls into the valid split" in told
    assert "valid_fraction (0.05)" in told
    told = message(["one document"], valid_fraction=0.9999)
    assert "into the train split; lower valid_fraction" in told
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl: the corpus is empty" in message(["one"], valid=empty)
    assert "a.jsonl: the corpus is empty" in message([], valid=str(tmp_path / "a.jsonl"))


def test_small_text_file_gets_both_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Paragraph {i} says a thing.\n\n" for i in range(4000)), "utf-8")
    data = make(word_config(str(path)), tmp_path)
    assert data.valid.documents > 0
    assert data.train.documents > 50


def test_bad_text_is_named_and_leaves_no_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    message = error_of(lambda: make(word_config(str(path)), tmp_path, out=tmp_path / "out"))
    assert "line 2" in message
    assert set(contents(tmp_path / "out")) == {".lock", "stages.json"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"errors": "ignore"}, "'strict' or 'replace'"),
        ({"valid_fraction": 0.0}, "between 0 and 1"),
        ({"valid_fraction": 1.0}, "between 0 and 1"),
        ({"vocab_size": 2, "tokenizer": "word"}, "at least 3"),
        ({"vocab_size": 100}, "at least 257"),
        ({"vocab_size": 100, "tokenizer": "a.json"}, "already trained"),
        ({"data": ""}, "data is empty"),
        ({"valid": ""}, "valid is empty"),
    ],
)
def test_config_validates_itself(settings: dict[str, Any], expected: str) -> None:
    assert expected in error_of(lambda: DataConfig(**settings))


def test_progress_is_one_line_a_stage(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(word_config(corpus), cache_dir=tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["train tokenizer", "encode"]
    assert "304 documents" in lines[1]
    prepare(word_config(corpus, vocab_size=21), cache_dir=tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(word_config(corpus), cache_dir=tmp_path)
    err = capsys.readouterr().err
    assert "100%" in err
    assert "304 documents" in err


MEASURED = """
import sys
from tinylm.data import DataConfig, prepare
prepare(DataConfig(data=sys.argv[1], tokenizer=sys.argv[2], vocab_size=300),
        cache_dir=sys.argv[1] + ".cache", progress=False)
# Not getrusage: its peak survives exec, and so would be that of the tests.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, kind: str) -> None:
    body = " ".join(text for text in some_texts(200) if text.isprintable())
    peaks = []
    # The smaller one is already larger than all batches and caches, which take what they may.
    for megabytes in (72, 216):
        path = tmp_path / f"{megabytes}.jsonl"
        documents = megabytes * 1_000_000 // (20 * len(body.encode()))
        path.write_text(
            "".join(
                json.dumps({"text": f"{i} " + 20 * body}, ensure_ascii=False) + "\n"
                for i in range(documents)
            ),
            "utf-8",
        )
        command = [sys.executable, "-c", MEASURED, str(path), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] - peaks[0] < 30, peaks


def test_import_is_light() -> None:
    code = (
        "import sys, tinylm.data;"
        "print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prepared_folder_as_data(corpus: str, tmp_path: Path) -> None:
    made = prepare(DataConfig(data=corpus, tokenizer="word", vocab_size=50), out=tmp_path / "made")
    opened = prepare(DataConfig(data=str(tmp_path / "made"), tokenizer="word"))
    assert opened.path == made.path
    assert (opened.train.ids == made.train.ids).all()
    for options, message in [
        ({"tokenizer": "bpe"}, "prepared with tokenizer word, not bpe"),
        ({"tokenizer": "word", "vocab_size": 60}, "prepared with vocab_size 50, not 60"),
        ({"tokenizer": "word", "document_eos": False}, "document_eos True, not False"),
        ({"tokenizer": "word", "valid": corpus}, "has its own validation split"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare(DataConfig(data=str(tmp_path / "made"), **options))  # type: ignore[arg-type]
