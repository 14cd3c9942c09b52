"""Text in invented scripts, so that a script never seen is not a catastrophe.

A byte-level vocabulary can spell any text, but a model has learnt how likely each byte is only
for the scripts in its training text. In another one every letter costs more bits than it has: its
first byte never occurred, and the longer a model is trained, the surer it is of that. A little text
whose letters are exchanged for those of random alphabets teaches what holds in all scripts: letters
share their first bytes, and which ones may follow.
"""

import string
from dataclasses import replace

import numpy as np

from tinylm.data.tokens import Dataset, TokenFile
from tinylm.tokenizer import Tokenizer

LETTERS = [ord(letter) for letter in string.ascii_letters]
# The alphabets of the world, from Greek on: two or three bytes in UTF-8.
FIRST, LAST, BLOCK = 0x0370, 0x2000, 64
PIECE = 512  # tokens in one script
# Longer streams stay on disk; and so much text has the world's scripts in it.
MOST_TOKENS = 200_000_000


def with_invented_scripts(dataset: Dataset, share: float, seed: int) -> Dataset:
    """``dataset`` whose training split is longer by ``share``: parts of it in invented scripts.

    Word-level vocabularies have no letters, and their data stay as they are.
    """
    train = dataset.train
    pieces = round(share * len(train) / PIECE)
    if dataset.tokenizer.kind != "bpe" or len(train) > MOST_TOKENS or not pieces:
        return dataset
    starts = np.linspace(0, max(0, len(train) - PIECE), pieces).astype(np.int64)
    texts = [train.ids[start : start + PIECE] for start in starts]
    random = np.random.default_rng(abs(seed))
    written = [_in_a_script(ids, dataset.tokenizer, random) for ids in texts]
    ids = np.concatenate([train.ids, *(np.array(w, train.dtype) for w in written)])
    ends = len(train) + np.cumsum([len(w) for w in written])
    longer = TokenFile(ids, np.concatenate([train.offsets, ends]))
    return replace(dataset, splits=dataset.splits | {"train": longer})


def _in_a_script(ids: np.ndarray, tokenizer: Tokenizer, random: np.random.Generator) -> list[int]:
    """The first ids of the same text in the letters of an invented script, and ``<EOS>``."""
    block = int(random.integers(FIRST, LAST - BLOCK))
    chosen = random.permutation(BLOCK)[: len(LETTERS)] + block
    alphabet = dict(zip(LETTERS, chosen.tolist(), strict=True))
    text = tokenizer.decode(ids[ids != tokenizer.eos_id])
    written = tokenizer.encode(text.translate(alphabet), add_eos=False)
    return [*written[: PIECE - 1], tokenizer.eos_id]
