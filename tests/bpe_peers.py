"""The same training in Hugging Face tokenizers, and the merges of both."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinylm.tokenizer.bpe_json import EOS
from tinylm.tokenizer.split_patterns import REGEX

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def train_in_hf(
    texts, vocab_size, min_frequency=2, pattern="gpt2", special_tokens=(EOS,), **kwargs
):
    other = tokenizers.Tokenizer(models.BPE(**kwargs))
    other.pre_tokenizer = BYTE_LEVEL
    if pattern != "gpt2":
        split = pre_tokenizers.Split(tokenizers.Regex(REGEX[pattern]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    other.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(texts, trainer)
    return other


def merges_of_hf(other):
    merges = json.loads(other.to_str())["model"]["merges"]
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def merges_of(tokenizer):
    names = tokenizer._vocabulary.names
    return [(names[a], names[b]) for a, b, _ in tokenizer._vocabulary.merges.tolist()]
