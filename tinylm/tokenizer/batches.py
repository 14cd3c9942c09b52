"""Checks and cuts what both tokenizers are given: several texts, a number of threads."""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar, get_args

from tinylm.errors import InputError

Errors = Literal["strict", "replace"]

# A string, or its UTF-8 in anything that lends its bytes.
Text = str | bytes | bytearray | memoryview | mmap.mmap
AnyText = TypeVar("AnyText", bound=Text)

BATCH_CHARACTERS = 1 << 23  # handed on at once: enough to keep all threads busy


def check_threads(threads: int | None) -> None:
    """Raises `InputError` unless ``threads`` is None (as many as the machine has) or positive."""
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for all")


def check_texts(texts: Iterable[Text]) -> None:
    """Raises `InputError` for a single text, whose characters or bytes would pass for texts."""
    if isinstance(texts, str):
        raise InputError("texts is one string; it must be a list of strings")
    if isinstance(texts, (bytes, bytearray, memoryview, mmap.mmap)):
        raise InputError(f"texts is one {type(texts).__name__}; it must be a list of texts")


def batches(texts: Iterable[AnyText]) -> Iterator[list[AnyText]]:
    """``texts`` in lists of about ``BATCH_CHARACTERS``. Raises as `check_texts`."""
    check_texts(texts)
    batch: list[AnyText] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
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


def surrogate_error(error: UnicodeEncodeError, texts: Sequence[str] = ()) -> InputError:
    """What to raise for a text, one of ``texts`` if given, that cannot be encoded as UTF-8."""
    # The position in a batch is that of the very object which could not be encoded.
    index = next((i for i, text in enumerate(texts) if text is error.object), None)
    where = "the text" if index is None else f"text {index}"
    code = f"\\u{ord(error.object[error.start]):04x}"
    return InputError(
        f"{where} has the lone surrogate {code} at position {error.start}, which is no character; "
        "clean the text or pass errors='replace' to read it as U+FFFD"
    )
