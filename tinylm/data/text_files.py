"""Text files of any size straight into a token file."""

import os
from collections.abc import Sequence
from pathlib import Path

from tinylm.data.encode import split_writer
from tinylm.data.formats import Position, decode_text
from tinylm.data.tokens import TokenFile, map_split, token_dtype
from tinylm.errors import InputError
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.batches import batches, check_threads, is_replace
from tinylm.tokenizer.cuts import parts_of
from tinylm.tokenizer.progress import Progress, Teller

# Several make a batch, so that threads have something to share.
PART_CHARACTERS = 1 << 18


def encode_files(
    tokenizer: Tokenizer,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    add_eos: bool = True,
    errors: str = "strict",
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Writes the ids of text files, each one document, to ``out`` (``NAME.bin``) and ``NAME.docs``.

    The ids are those of the whole texts, but no text is ever in memory as a whole: files are read
    in parts of about a megabyte. Where a text has no place to be cut (a space or a line end
    between words), a part is as long as it takes to get there. Both files appear only once they
    are complete.

    Args:
        tokenizer: word level or BPE.
        paths: UTF-8 text; a byte order mark at the start is dropped.
        out: the token file, in the format of `tinylm.data.tokens`.
        add_eos: end each document with the end-of-text id.
        errors: ``strict`` or ``replace``, which reads U+FFFD where a file is not UTF-8.
        threads: how many to encode on; None: as many as the machine has.
        progress: called with ``"encode"``, the bytes read and those in all, every tenth of a
            second or so and at the end; what it raises ends the call.

    Raises:
        InputError: a file cannot be read or is not UTF-8 (the byte and line are named), ``out`` is
            not called ``NAME.bin``, or the disk is full.
    """
    target, files = Path(out), [Path(path) for path in paths]
    is_replace(errors)
    check_threads(threads)
    if target.suffix != ".bin":
        raise InputError(f"{target} must be called NAME.bin; NAME.docs is written beside it")
    total = sum(map(_size, files))
    position, tell = Position(), Teller(progress, "encode")
    prefixed = getattr(tokenizer, "add_prefix_space", False)
    folder, name = target.parent, target.stem
    with split_writer(folder, name, tokenizer, add_eos, stream_eos=False) as writer:
        for path in files:
            parts = parts_of(decode_text(path, errors, position), PART_CHARACTERS, prefixed)
            with writer.document():
                for batch in batches(parts):
                    writer.add_parts(batch, threads)
                    tell(position.bytes_read, total)
            position.finish_file(_size(path))
        tell.last(position.bytes_read, total)
    return map_split(folder, name, token_dtype(tokenizer.vocab_size).name)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from None
