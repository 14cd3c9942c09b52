"""The files that a `BPETokenizer` is read from and written to."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tinylm.tokenizer.bpe_files import (
    read_gpt2,
    read_tiktoken,
    with_merges,
    write_gpt2,
    write_tiktoken,
)
from tinylm.tokenizer.bpe_json import EOS, BPEVocabulary, read_vocabulary, write_vocabulary

T = TypeVar("T", bound="BPEFiles")


class BPEFiles:
    """What all formats come down to is a vocabulary."""

    def __init__(self, vocabulary: BPEVocabulary) -> None:
        self._vocabulary = vocabulary

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str], eos_token: str = EOS) -> T:
        """Reads a byte-level BPE ``tokenizer.json``, whoever wrote it.

        Raises:
            InputError: the file is missing or broken, lacks the special token ``eos_token``, or
                asks for something this class does not do (a normalizer, another pre-tokenizer).
        """
        return cls(read_vocabulary(path, eos_token))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``tokenizer.json`` that Hugging Face ``tokenizers`` reads too. Atomic.

        Raises:
            InputError: the tokenizer comes from a rank file so odd that no list of merges gives
                its ids.
        """
        write_vocabulary(with_merges(self._vocabulary), path)

    @classmethod
    def load_tiktoken(
        cls: type[T],
        path: str | os.PathLike[str],
        *,
        pattern: str,
        special_tokens: Mapping[str, int],
        eos_token: str = EOS,
    ) -> T:
        """Reads a rank file of tiktoken, such as ``cl100k_base.tiktoken``.

        The file holds tokens and their ids only, so ``pattern`` and the ids of the special tokens
        must be given: for that file ``"cl100k_tiktoken"`` and ``{"<|endoftext|>": 100257, ...}``.
        Ids are those of ``tiktoken.Encoding`` with the same arguments. Ids that no token has
        count in `vocab_size`, but cannot be decoded.

        Raises:
            InputError: the file is missing or broken (the line is named), or an argument does not
                fit it.
        """
        return cls(read_tiktoken(path, pattern, special_tokens, eos_token))

    def save_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Writes a rank file for tiktoken; special tokens and the pattern are not in it. Atomic.

        Raises:
            InputError: tiktoken would give other ids than this tokenizer.
        """
        write_tiktoken(self._vocabulary, path)

    @classmethod
    def load_gpt2(
        cls: type[T],
        vocab_path: str | os.PathLike[str],
        merges_path: str | os.PathLike[str],
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (EOS,),
        eos_token: str = EOS,
    ) -> T:
        """Reads ``vocab.json`` and ``merges.txt``, the files that GPT-2 was published with.

        They do not say which tokens are special, so ``special_tokens`` does.

        Raises:
            InputError: a file is missing or broken (of ``merges.txt`` the line is named), or
                lacks a special token.
        """
        vocabulary = read_gpt2(vocab_path, merges_path, pattern, special_tokens, eos_token)
        return cls(vocabulary)

    def save_gpt2(
        self, vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str]
    ) -> None:
        """Writes ``vocab.json`` and ``merges.txt``, each atomically; the pattern is in neither.

        Raises:
            InputError: these files cannot say what this tokenizer does: some token is reached by
                no merges, or a space is put before texts.
        """
        write_gpt2(self._vocabulary, vocab_path, merges_path)
