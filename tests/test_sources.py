"""Every kind of source: its documents, its errors, its fingerprint, its progress."""

import gzip
import json
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.data import open_source
from tinylm.data.builtin import BuiltinSource
from tinylm.data.sources import Source
from tinylm.errors import InputError


def jsonl(texts: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read(data: str, **options: Any) -> list[str]:
    return list(open_source(data, **options).documents())


def error_of(data: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data))


TEXTS = ["first", "second\u2028line\x85next\r\n", "", "naïve 東京 🙂", "\ud800 alone"]


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    raw = '{"text": "a\u2028b\x85c"}\r\n\n  \n{"n": 1, "text": "e\\nf"}'.encode()
    assert read(write(tmp_path / "a.jsonl", raw)) == ["a\u2028b\x85c", "e\nf"]


def test_packed_jsonl_reads_as_plain(tmp_path: Path) -> None:
    data = jsonl(TEXTS)
    # Packed files may hold several parts one after the other.
    half = data.index(b"\n") + 5
    parts = data[:half], data[half:]
    assert read(write(tmp_path / "a.jsonl", data)) == TEXTS
    packed = b"".join(gzip.compress(part) for part in parts)
    assert read(write(tmp_path / "a.jsonl.gz", packed)) == TEXTS
    packed = b"".join(zst(part) for part in parts)
    assert read(write(tmp_path / "a.jsonl.zst", packed)) == TEXTS


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=50)
    return str(path)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [f"text {i} é" for i in range(200)]
    path = parquet(tmp_path / "a.parquet", {"id": list(range(200)), "text": texts})
    assert read(path) == texts
    assert read(path, errors="replace") == texts
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = parquet(tmp_path / "b.parquet", {"text": pa.array(texts, pa.string()).cast(kind)})
        assert read(path) == read(path, errors="replace") == texts


def test_parquet_errors(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["a", None]})
    assert "no field 'text'; fields: id, body" in error_of(path)
    assert "row 0" in error_of(path, text_field="id")
    assert "is int, not a string" in error_of(path, text_field="id")
    assert "row 1: field 'body' is null" in error_of(path, text_field="body")
    content = Path(path).read_bytes()
    assert "not a readable Parquet file" in error_of(write(tmp_path / "b.parquet", content[:-9]))
    assert "not a readable Parquet file" in error_of(write(tmp_path / "c.parquet", b""))
    wrong = pa.array([b"ok", b"\xff!"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "d.parquet", {"text": wrong})
    assert "not valid UTF-8" in error_of(path)
    assert read(path, errors="replace") == ["ok", "\ufffd!"]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    content = "\ufeffone\r\n\r\ntwo \ufeff three\n" * 100
    assert read(write(tmp_path / "a.txt", content.encode())) == [content[1:]]


def test_long_text_is_cut_at_paragraphs(tmp_path: Path) -> None:
    paragraph = "word " * 30
    content = "".join(f"{i} {paragraph}\n{'' if i % 3 else ' '}\n" for i in range(5000))
    path = write(tmp_path / "a.txt", content.encode())
    pieces = read(path, cut=True)
    assert "".join(pieces) == content
    assert 400 <= len(pieces) <= 800
    limit = len(content) // 400
    assert all(limit // 2 - 200 <= len(piece) <= limit for piece in pieces[:-1])
    assert all(piece.rstrip(" ").endswith("\n") for piece in pieces)
    assert all(piece[0].isdigit() for piece in pieces)
    assert read(path) == [content]


@given(st.text(alphabet="ab \n\r\té🙂", max_size=6000))
def test_cut_pieces_join_to_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    pieces = read(write(path, text.encode()), cut=True)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 1024 for piece in pieces)


def test_huge_document_is_cut_anywhere(tmp_path: Path) -> None:
    pieces = read(write(tmp_path / "a.txt", ("é" * 3_000_000).encode()))
    assert [len(piece) for piece in pieces] == [1 << 20, 1 << 20, 3_000_000 - (1 << 21)]
    path = write(tmp_path / "b.txt", b"a " * 20_000_000)
    assert {len(piece) for piece in read(path, cut=True)[:-1]} == {1 << 16}


def test_many_text_files_stay_whole(tmp_path: Path) -> None:
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", f"{i} ".encode() * 2000)
    assert len(read(str(tmp_path), cut=True)) == 100
    (tmp_path / "099.txt").unlink()
    assert len(read(str(tmp_path), cut=True)) > 200


def test_folder_and_glob_are_sorted(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", jsonl(["B1", "B2"]))
    write(tmp_path / "a" / "z.txt", b"AZ")
    write(tmp_path / "c.jsonl.gz", gzip.compress(jsonl(["C"])))
    write(tmp_path / "notes.doc", b"passed over")
    write(tmp_path / ".hidden" / "x.txt", b"passed over")
    assert read(str(tmp_path)) == ["AZ", "B1", "B2", "C"]
    assert read(str(tmp_path / "*.jsonl*")) == ["B1", "B2", "C"]
    assert read(str(tmp_path / "**" / "*.txt")) == ["AZ"]
    assert "notes.doc: unknown kind of file" in error_of(str(tmp_path / "*"))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    assert "no such file" in error_of(str(tmp_path / "missing"))
    assert "no such file" in error_of("missing.jsonl")
    assert "no such file" in error_of("missing.csv")
    assert ".jsonl.zst, .parquet" in error_of(write(tmp_path / "a.csv", b"x"))
    assert "no file matches" in error_of(str(tmp_path / "*.txt"))
    (tmp_path / "empty").mkdir()
    assert "no text in this folder" in error_of(str(tmp_path / "empty"))


def test_invalid_utf8_names_byte_and_line(tmp_path: Path) -> None:
    start = b"\xef\xbb\xbf" + "é\n".encode() * 700_000
    path = write(tmp_path / "a.txt", start + b"ok \xff end")
    message = error_of(path)
    assert f"byte {len(start) + 3} (line 700001) is not valid UTF-8" in message
    assert '"replace"' in message
    assert "".join(read(path, errors="replace")).endswith("\nok \ufffd end")
    message = error_of(write(tmp_path / "b.txt", b"cut \xe2\x82"))
    assert "byte 4 (line 1)" in message
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "fine"}\n{"text": "a\xe9b"}\n')
    assert "byte 31 (line 2)" in error_of(path)
    assert read(path, errors="replace") == ["fine", "a\ufffdb"]


def test_lone_surrogates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude42"}')
    assert read(path) == ["a\ud800b 🙂"]
    assert read(path, errors="replace", surrogates=False) == ["a\ufffdb 🙂"]
    message = error_of(path, surrogates=False)
    assert "line 1: character 1 of the text is \\ud800" in message
    assert 'errors to "replace"' in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{text: 1}", "line 2: not valid JSON"),
        (b"[" * 100_000, "line 2: not valid JSON"),
        (b'["a"]', "line 2: holds a list, not an object"),
        (b'{"body": "a", "id": 1}', "line 2: no field 'text'; fields: body, id;"),
        (b"{}", "fields: none"),
        (b'{"text": null}', "line 2: field 'text' is null, not a string"),
        (b'{"text": ["a"]}', "line 2: field 'text' is list, not a string"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + line + b"\n")
    assert expected in error_of(path)


def test_text_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"body": "a", "text": 1}\n')
    assert read(path, text_field="body") == ["a"]


def test_truncated_and_corrupt_packing(tmp_path: Path) -> None:
    data = jsonl(f"{i * i} text" for i in range(3000))
    for name, packed in (("a.jsonl.gz", gzip.compress(data)), ("a.jsonl.zst", zst(data))):
        assert "truncated or corrupt" in error_of(write(tmp_path / name, packed[:-20]))
        assert "truncated or corrupt" in error_of(write(tmp_path / name, b"no packing"))
        broken = packed[:500] + bytes(100) + packed[600:]
        assert str(tmp_path) in error_of(write(tmp_path / name, broken))


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in error_of(write(tmp_path / "a.jsonl.zst", b"x"))


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(["a"] * 100)))
    write(tmp_path / "b.txt", b"b" * 5000)
    parquet(tmp_path / "c.parquet", {"text": ["c"] * 100})
    source = open_source(str(tmp_path))
    assert source.total_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    for _ in range(2):
        seen = [source.bytes_read for _ in source.documents()]
        assert seen == sorted(seen)
        assert seen[0] < source.bytes_read == source.total_bytes


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = write(tmp_path / "in" / "a.txt", b"one")
    first = open_source(path).fingerprint(cache)
    assert open_source(path).fingerprint(cache) == first
    assert open_source(write(tmp_path / "b.txt", b"one")).fingerprint(cache) == first
    assert open_source(write(tmp_path / "b.jsonl", b"one")).fingerprint(cache) != first
    write(tmp_path / "in" / "a.txt", b"two")
    assert open_source(path).fingerprint(cache) != first


def test_fingerprint_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from tinylm.data import cache

    path = write(tmp_path / "a.txt", b"one")
    os.utime(path, (1e9, 1e9))
    first = open_source(path).fingerprint(tmp_path / "cache")

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_hash_file", refuse)
        assert open_source(path).fingerprint(tmp_path / "cache") == first
        os.utime(path, (1e9, 1e9 + 1))
        with pytest.raises(AssertionError, match="hashed again"):
            open_source(path).fingerprint(tmp_path / "cache")
    for memo in (tmp_path / "cache" / "hashes").iterdir():
        memo.write_bytes(b"damaged")
    assert open_source(path).fingerprint(tmp_path / "cache") == first


def test_builtin_is_deterministic_prose_first(tmp_path: Path) -> None:
    write(
        tmp_path / "b.py",
        b'"""About b."""\nx = 1\n\n\ndef f():\n    """Says\n    f."""\n    return 2\n',
    )
    write(tmp_path / "a" / "c.py", b"class C:\n    '''The C class.'''\n")
    write(tmp_path / "broken.py", b"def (")
    write(tmp_path / "test" / "t.py", b'"""Not this one."""')
    source = BuiltinSource(tmp_path)
    documents = list(source.documents())
    own = [text for text in documents if "import" not in text and len(text) < 60]
    assert own[-4:] == [
        "C\n\nThe C class.\n",
        "b\n\nAbout b.\n\nf\n\nSays\nf.\n",
        "class C:\n",
        "x = 1\n\n\ndef f():\n    return 2\n",
    ]
    assert source.bytes_read == source.total_bytes
    assert list(source.documents()) == list(BuiltinSource(tmp_path).documents()) == documents
    before = source.fingerprint(tmp_path / "cache")
    write(tmp_path / "b.py", b"y = 1\n")
    assert BuiltinSource(tmp_path).fingerprint(tmp_path / "cache") != before


def test_builtin_reads_this_python() -> None:
    source = open_source("builtin")
    assert isinstance(source, Source)
    assert source.total_bytes > 5_000_000
    assert len(next(iter(BuiltinSource(Path(json.__file__).parent).documents()))) > 100


class FakeData:
    """The part of a `datasets.Dataset` that is used."""

    def __init__(self, columns: dict[str, list[Any]], fingerprint: str = "f1") -> None:
        self.columns, self._fingerprint = columns, fingerprint
        self.column_names = list(columns)
        self.data = types.SimpleNamespace(nbytes=1000)

    def __len__(self) -> int:
        return len(self.columns["text"])

    def select_columns(self, names: list[str]) -> "FakeData":
        return FakeData({name: self.columns[name] for name in names}, self._fingerprint)

    def iter(self, batch_size: int) -> Iterable[dict[str, list[Any]]]:
        for start in range(0, len(self), batch_size):
            yield {n: column[start : start + batch_size] for n, column in self.columns.items()}


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(repository: str, config: str | None, split: str) -> Any:
        asked.append((repository, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        types.SimpleNamespace(load_dataset=load_dataset),  # type: ignore[arg-type]
    )
    return asked


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i}" for i in range(150)]
    asked = fake_hub(monkeypatch, FakeData({"text": texts, "meta": list(range(150))}))
    source = open_source("owner/name")
    assert list(source.documents()) == texts
    assert source.bytes_read == source.total_bytes == 1000
    other = open_source("owner/name:small:test")
    open_source("name::validation")
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", "small", "test"),
        ("name", None, "validation"),
    ]
    assert source.fingerprint(tmp_path) != other.fingerprint(tmp_path)
    assert "no field 'body'; fields: text, meta" in error_of("owner/name", text_field="body")
    fake_hub(monkeypatch, FakeData({"text": ["a", 3]}))
    assert "row 1: field 'text' is int" in error_of("owner/name")


def test_hub_errors_name_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ConnectionError("Couldn't reach\nthe Hub"))
    message = error_of("owner/name")
    assert "no network" in message
    assert "builtin" in message
    assert ".jsonl" in message
    fake_hub(monkeypatch, FileNotFoundError("Dataset 'owner/name' doesn't exist"))
    message = error_of("owner/name")
    assert "neither a file here nor a data set" in message
    assert "builtin" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of("owner/name")
