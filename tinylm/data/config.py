"""What to prepare, and how: the settings that decide the content of a data folder."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tinylm.errors import InputError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": help})


TOKENIZERS = ("word", "bpe")
DEFAULT_VOCAB_SIZE = 10_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Raises:
        InputError: a setting is out of its range.
    """

    data: str = option(
        "NeelNanda/pile-10k",
        "a Hugging Face data-set id (owner/name[:config[:split]]), a .txt, .jsonl, .jsonl.gz, "
        ".jsonl.zst or .parquet file, a folder or glob of these, a folder made by `tinylm "
        "prepare`, or `builtin`: text that comes with Python",
    )
    valid: str | None = option(None, "a second source for validation; a share of data if unset")
    text_field: str = option("text", "field of a record that holds its text")
    errors: Literal["strict", "replace"] = option(
        "strict", "strict stops at text that is not valid Unicode, replace puts U+FFFD there"
    )
    tokenizer: str = option("bpe", "bpe or word to train one, or the path of a tokenizer.json")
    vocab_size: int | None = option(None, "entries of the vocabulary to train; 10,000 if unset")
    valid_fraction: float = option(0.05, "share of the documents held out for validation")
    # False makes each split one stream with a single <EOS> at its very end, as the notebook did.
    document_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("data", "text_field", "tokenizer"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; give it a value or leave it out")
        if self.valid == "":
            raise InputError("valid is empty; give a source or leave it out to split data")
        if self.errors not in ("strict", "replace"):
            raise InputError(f"errors is {self.errors!r}; it must be 'strict' or 'replace'")
        if not 0.0 < self.valid_fraction < 1.0:
            raise InputError(
                f"valid_fraction is {self.valid_fraction}; it must be between 0 and 1, such as 0.05"
            )
        if self.vocab_size is not None:
            self._check_vocab_size(self.vocab_size)

    def _check_vocab_size(self, vocab_size: int) -> None:
        if not self.trains_tokenizer:
            raise InputError(
                f"vocab_size is {vocab_size}, but the tokenizer in {self.tokenizer} is already"
                " trained; leave vocab_size out"
            )
        least = 3 if self.tokenizer == "word" else 257
        if vocab_size < least:
            raise InputError(
                f"vocab_size is {vocab_size}; a {self.tokenizer} vocabulary needs at least {least}"
            )

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained, rather than read from a file."""
        return self.tokenizer in TOKENIZERS

    @property
    def target_vocab_size(self) -> int | None:
        """The vocabulary size to train, defaults filled in; ``None`` with a ready tokenizer."""
        if not self.trains_tokenizer:
            return None
        return self.vocab_size or DEFAULT_VOCAB_SIZE
