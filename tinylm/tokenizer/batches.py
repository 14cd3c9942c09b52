"""Checks and cuts what both tokenizers are given: several texts, a number of threads."""

from collections.abc import Iterable, Iterator

from tinylm.errors import InputError

BATCH_CHARACTERS = 1 << 23  # handed on at once: enough to keep all threads busy


def check_threads(threads: int | None) -> None:
    """Raises `InputError` unless ``threads`` is None (as many as the machine has) or positive."""
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for all")


def check_texts(texts: Iterable[str]) -> None:
    """Raises `InputError` for a single string, whose characters would pass for texts."""
    if isinstance(texts, str):
        raise InputError("texts is one string; it must be a list of strings")


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """``texts`` in lists of about ``BATCH_CHARACTERS``. Raises as `check_texts`."""
    check_texts(texts)
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
