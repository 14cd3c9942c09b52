"""Readers of one file each: documents out of text, JSON lines and Parquet, in bounded memory."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tinylm.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
KNOWN = ", ".join(SUFFIXES)
READ_BYTES = 1 << 20
# One compressed read may decompress to many times its size, so it is kept small.
ZSTD_READ_BYTES = 1 << 14
MAX_DOCUMENT_CHARS = 1 << 20

_SURROGATES = re.compile("[\ud800-\udfff]")
_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n")
_SPACE = re.compile(r"\s")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a file.

    Attributes:
        text_field: as in `DataConfig`.
        errors: as in `DataConfig`.
        surrogates: let lone surrogates, which JSON escapes can spell and UTF-8 cannot, pass.
        document_chars: length that no document of a .txt exceeds.
    """

    text_field: str = "text"
    errors: str = "strict"
    surrogates: bool = True
    document_chars: int = MAX_DOCUMENT_CHARS


class Position:
    """Bytes of a source read so far: of the finished files, and of the open one."""

    def __init__(self) -> None:
        self._finished = 0
        self._current = 0

    def at(self, offset: int) -> None:
        self._current = offset

    def finish_file(self, size: int) -> None:
        self._finished += size
        self._current = 0

    @property
    def bytes_read(self) -> int:
        return self._finished + self._current


def suffix_of(path: Path) -> str | None:
    """The suffix that says how to read ``path``, or ``None`` if no reader knows it."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def read_documents(path: Path, options: ReadOptions, position: Position) -> Iterator[str]:
    """Documents of one file in order; ``position`` follows the bytes read from it.

    Raises:
        InputError: the file is unreadable, truncated, corrupt or not in the form its suffix says.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path}: unknown kind of file; use one of {KNOWN}")
    if suffix == ".txt":
        yield from _read_text(path, options, position)
    elif suffix == ".parquet":
        yield from _read_parquet(path, options, position)
    else:
        yield from _read_jsonl(path, options, position)


# --- .txt --------------------------------------------------------------------------------------


def _read_text(path: Path, options: ReadOptions, position: Position) -> Iterator[str]:
    """The whole file as one document or, if longer, pieces of at most ``document_chars``.

    Pieces end at the last blank line that fits, else at the last line end, else at the last white
    space, else anywhere; joined they are the file again, without a byte order mark at its start.
    """
    limit, buffer = options.document_chars, ""
    for text in decode_text(path, options.errors, position):
        buffer += text
        start = 0
        while len(buffer) - start > limit:
            end = _cut(buffer, start, start + limit)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _cut(text: str, start: int, limit: int) -> int:
    """Where to end the piece of ``text`` that begins at ``start`` and may reach ``limit``."""
    window = text[start:limit]
    # A piece is at least half full, or else short paragraphs would make tiny documents.
    half = len(window) // 2
    for end_of in (_PARAGRAPH_END, re.compile("\n"), _SPACE):
        ends = [match.end() for match in end_of.finditer(window, half)]
        if ends:
            return start + ends[-1]
    return limit


def decode_text(path: Path, errors: str, position: Position) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, line ends untouched, a leading BOM dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = lines = 0
    with _opened(path) as file:
        while True:
            chunk = file.read(READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset - pending, lines + 1) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(chunk)
            lines += chunk.count(b"\n")
            position.at(offset)
            yield text
            if not chunk:
                return


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int, line: int) -> InputError:
    """``error`` as an `InputError`; its bytes began at ``offset`` of the file, in line ``line``."""
    line += error.object.count(b"\n", 0, error.start)
    return InputError(
        f"{path}: byte {offset + error.start} (line {line}) is not valid UTF-8 ({error.reason});"
        ' convert the file to UTF-8, or set errors to "replace" to go on with U+FFFD there'
    )


# --- .jsonl ------------------------------------------------------------------------------------


def _read_jsonl(path: Path, options: ReadOptions, position: Position) -> Iterator[str]:
    offset = 0
    with _opened(path) as file, _decompressed(path, file) as lines:
        for number, line in enumerate(_lines(path, lines), 1):
            if line.strip():
                yield _text_of_line(path, number, line, offset, options)
            offset += len(line)
            position.at(file.tell())


def _lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Lines cut at ``\\n`` only: JSON strings may hold U+2028 and other line ends as they are."""
    try:
        yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: the compressed data is truncated or corrupt ({error}); fetch the file again"
        ) from None


def _text_of_line(path: Path, number: int, line: bytes, offset: int, options: ReadOptions) -> str:
    try:
        text = line.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, offset, number) from None
    if number == 1:
        text = text.removeprefix("\ufeff")
    where = f"{path}, line {number}"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); each line must be a record") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: holds a {type(record).__name__}, not an object; write each line as"
            f' {{"{options.text_field}": "..."}}'
        )
    return text_of_record(record, where, options)


def text_of_record(record: dict[str, Any], where: str, options: ReadOptions) -> str:
    """The text of one record.

    Raises:
        InputError: the field is missing, not a string, or holds a lone surrogate where those may
            not pass; ``where`` names the record.
    """
    field = options.text_field
    if field not in record:
        raise missing_field(where, field, list(record))
    text = record[field]
    if not isinstance(text, str):
        raise InputError(
            f"{where}: field {field!r} is {'null' if text is None else type(text).__name__}, not a"
            " string; name another field (text_field) or repair the record"
        )
    if options.errors == "replace":
        return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
    if not options.surrogates:
        _check_surrogates(text, where)
    return text


def _check_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of the text is \\u{ord(text[error.start]):04x}, half"
            ' of a pair and no character; repair the record, or set errors to "replace"'
        ) from None


def missing_field(where: str, field: str, present: list[str]) -> InputError:
    shown = ", ".join(present[:20]) or "none"
    return InputError(f"{where}: no field {field!r}; fields: {shown}; name one with text_field")


@contextmanager
def _decompressed(path: Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield cast(IO[bytes], unpacked)
    elif name.endswith(".zst"):
        yield cast(IO[bytes], io.BufferedReader(_ZstdReader(file), READ_BYTES))
    else:
        yield file


class _ZstdReader(io.RawIOBase):
    """Frames of zstandard one after the other.

    The library's own reader takes a truncated file for a short one; this one raises `EOFError`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(
                "reading .zst needs the package zstandard; install it with"
                " `pip install zstandard`, or unpack the file"
            ) from None
        self._file = file
        # The largest window the format's tools write with --long=31; the default refuses it.
        self._codec = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._file.read(ZSTD_READ_BYTES)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("the last frame has no end")
                    return 0
            self._unpack()
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._codec.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise EOFError(str(error)) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None


# --- .parquet ----------------------------------------------------------------------------------


def _read_parquet(path: Path, options: ReadOptions, position: Position) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(
            "reading .parquet needs the package pyarrow; install it with `pip install pyarrow`"
        ) from None
    size = path.stat().st_size
    try:
        with (
            _opened(path) as raw,
            pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20) as file,
        ):
            names = file.schema_arrow.names
            if options.text_field not in names:
                raise missing_field(str(path), options.text_field, names)
            row, rows = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=64, columns=[options.text_field]):
                for value in _strings(batch.column(0), options.errors):
                    yield text_of_record({options.text_field: value}, f"{path}, row {row}", options)
                    row += 1
                position.at(size * row // rows)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, after row {row}: a string is not valid UTF-8 ({error.reason}); repair the"
            ' file, or set errors to "replace"'
        ) from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable Parquet file ({reason}); fetch it again"
        ) from None


def _strings(column: Any, errors: str) -> list[Any]:
    """A column's values; text is decoded here, as pyarrow itself knows only strict decoding."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if errors == "replace" and pa.types.is_string(column.type):
        return [
            v if v is None else v.decode("utf-8", errors) for v in column.view("binary").to_pylist()
        ]
    if errors == "replace" and pa.types.is_large_string(column.type):
        column = column.view("large_binary")
        return [v if v is None else v.decode("utf-8", errors) for v in column.to_pylist()]
    return cast(list[Any], column.to_pylist())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", buffering=READ_BYTES))
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}; check the path and its rights"
            ) from None
        yield file
