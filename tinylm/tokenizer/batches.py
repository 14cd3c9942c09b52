"""Checks and cuts what both tokenizers are given: several texts, a number of threads."""

from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap
from typing import Any, Literal, get_args

from tinylm.errors import InputError

Errors = Literal["strict", "replace"]
Text = str | bytes | bytearray | memoryview | mmap
"""Text, or the UTF-8 of it in anything that has the buffer protocol."""

BATCH_CHARACTERS = 1 << 23  # handed on at once: enough to keep all threads busy


def check_threads(threads: int | None) -> None:
    """Raises `InputError` unless ``threads`` is None (as many as the machine has) or positive."""
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for all")


def check_texts(texts: Iterable[Any]) -> None:
    """Raises `InputError` for a single text, whose characters would pass for texts."""
    if isinstance(texts, Text):
        kind = "string" if isinstance(texts, str) else type(texts).__name__
        raise InputError(f"texts is one {kind}; it must be a list of texts")
    if not isinstance(texts, Iterable):
        raise InputError(f"texts is of type {type(texts).__name__}; it must be a list of texts")


def to_text(text: Any, errors: str, where: str = "the text") -> str:
    """``text``, decoded from UTF-8 if it is a buffer.

    Raises:
        InputError: it is neither, or not UTF-8 and ``errors`` is not ``"replace"``, which reads
            U+FFFD there.
    """
    if isinstance(text, str):
        return text
    try:
        view = memoryview(text)
    except TypeError:
        raise InputError(
            f"{where} is of type {type(text).__name__}; it must be str, or bytes of UTF-8"
        ) from None
    with view:
        try:
            return str(view if view.c_contiguous else view.tobytes(), "utf-8", errors)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not valid UTF-8 at byte {error.start} ({error.reason}); convert it or "
                "pass errors='replace' to read U+FFFD there"
            ) from None


def to_texts(texts: Iterable[Any], errors: str) -> Sequence[str]:
    """All ``texts`` as by `to_text`, with no copy of those that are strings."""
    sequence = _sequence(texts)
    if set(map(type, sequence)) <= {str}:
        return sequence
    return [to_text(text, errors, f"text {i}") for i, text in enumerate(sequence)]


def to_texts_or_bytes(texts: Iterable[Any], errors: str) -> Sequence[str | bytes]:
    """The same, but ``bytes``, which nobody can change meanwhile, as they are and unread."""
    sequence = _sequence(texts)
    if set(map(type, sequence)) <= {str, bytes}:
        return sequence
    return [
        text if isinstance(text, bytes) else to_text(text, errors, f"text {i}")
        for i, text in enumerate(sequence)
    ]


def _sequence(texts: Iterable[Any]) -> Sequence[Any]:
    check_texts(texts)
    return texts if isinstance(texts, (list, tuple)) else list(texts)


def batches(texts: Iterable[Any]) -> Iterator[list[Any]]:
    """``texts`` in lists of about ``BATCH_CHARACTERS``. Raises as `check_texts`."""
    check_texts(texts)
    batch: list[Any] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text) if hasattr(text, "__len__") else 0
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def is_replace(errors: str) -> bool:
    """Whether lone surrogates are to be read as U+FFFD; `InputError` for an unknown setting."""
    if errors not in get_args(Errors):
        raise InputError(f"errors is {errors!r}; it must be 'strict' or 'replace'")
    return errors == "replace"


def surrogate_error(error: UnicodeEncodeError, texts: Sequence[str | bytes] = ()) -> InputError:
    """What to raise for a text, one of ``texts`` if given, that cannot be encoded as UTF-8."""
    # The position in a batch is that of the very object which could not be encoded.
    index = next((i for i, text in enumerate(texts) if text is error.object), None)
    where = "the text" if index is None else f"text {index}"
    code = f"\\u{ord(error.object[error.start]):04x}"
    return InputError(
        f"{where} has the lone surrogate {code} at position {error.start}, which is no character; "
        "clean the text or pass errors='replace' to read it as U+FFFD"
    )
