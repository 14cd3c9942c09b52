"""What is known of tokens before training, from counts: which are alike, and which never occur.

A small model spends most of a short run on finding out that " cell" is more like " tissue" than
like " court". Counting each token's neighbours over the whole training split, and factorising
the table, says so in a second or two. Only initial weights change, so exports stay what they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tinylm.config import TrainConfig
from tinylm.data import Dataset
from tinylm.model import Transformer

# With the rows' scale come logits of the usual size at the start, and an embedding large enough
# that AdamW's first steps move it without wiping it out.
EMBEDDING_STD, FINAL_NORM_WEIGHT = 0.1, 0.2
COUNTED_TOKENS = 20_000_000  # more than these are sampled: the table hardly changes any more
PIECES = 64
RARE_BYTES = 64
OVERSAMPLE, ITERATIONS = 16, 3  # of the subspace iteration


def initial_model(config: TrainConfig, dataset: Dataset, device: torch.device) -> Transformer:
    """The model that a run on ``dataset`` starts from."""
    model = Transformer(config.model, seed=config.seed)
    if config.embedding_init == "cooccurrence":
        vocab_size, width = model.embedding.weight.shape
        with torch.no_grad():
            with _one_thread():  # by several, sums round otherwise, and so the whole run differs
                rows_VC = cooccurrence_embedding(dataset.train.ids, vocab_size, width)
            model.embedding.weight.copy_(EMBEDDING_STD * rows_VC)
            if config.model.tie_embeddings and config.model.pre_norm:
                model.norm.weight.fill_(FINAL_NORM_WEIGHT)  # type: ignore[operator]
    model.to(device)
    if config.model.tie_embeddings and dataset.tokenizer.kind == "bpe":
        teach_unseen(model.embedding.weight, *unseen_and_rare(dataset))
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def unseen_and_rare(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Ids that the training split never uses, and of the bytes that it does, the rarest."""
    tokenizer, ids = dataset.tokenizer, dataset.train.ids
    count_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(ids), COUNTED_TOKENS):
        part = ids[start : start + COUNTED_TOKENS]
        count_V += np.bincount(part, minlength=tokenizer.vocab_size)
    single = [len(tokenizer.id_to_token(i)) == 1 for i in range(tokenizer.vocab_size)]
    seen_bytes = np.flatnonzero(np.array(single) & (count_V > 0))
    rarest = seen_bytes[np.argsort(count_V[seen_bytes], kind="stable")]
    return np.flatnonzero(count_V == 0), rarest[:RARE_BYTES]


def teach_unseen(weight_VC: Tensor, unseen: np.ndarray, rare: np.ndarray) -> None:
    """Lets tokens that training never sees learn what the ``rare`` ones learn.

    All they hear from training themselves is "not you". AdamW's steps are as large for a small
    gradient as for a large one, so a run pushes them down without end, and a text in a script
    that training did not have, whose bytes they are, costs more bits than it has. So they start
    from the mean of the rare tokens' rows and get the mean of their gradients.
    """
    if not len(unseen) or not len(rare):
        return
    to, of = (torch.from_numpy(i).to(weight_VC.device) for i in (unseen, rare))

    def mean_to_unseen(x_VC: Tensor) -> Tensor:
        return x_VC.index_copy(0, to, x_VC[of].mean(dim=0).expand(len(to), -1))

    with torch.no_grad():
        weight_VC.copy_(mean_to_unseen(weight_VC))
    weight_VC.register_hook(mean_to_unseen)  # type: ignore[no-untyped-call]


def cooccurrence_embedding(ids: np.ndarray, vocab_size: int, width: int, seed: int = 0) -> Tensor:
    """Vectors (V, C) of tokens, alike for tokens that occur beside the same tokens.

    Rows of ``U S^(1/2)``, where ``U S Wᵀ`` is the truncated singular value decomposition of
    ``[M, Mᵀ]`` and ``M`` the positive pointwise mutual information
    ``max(0, log p(i, j) / (p(i) p(j)))`` of a token i and the token j after it (Levy, Goldberg
    and Dagan 2015). It is found by subspace iteration (Halko, Martinsson and Tropp 2011). All
    rows have mean square 1; those of tokens without a neighbour to tell them by are random.
    """
    generator = torch.Generator().manual_seed(seed)
    m_VV = _mutual_information(_sample(ids), vocab_size)
    rank = min(width, vocab_size)
    q_VK = torch.randn(vocab_size, min(rank + OVERSAMPLE, vocab_size), generator=generator)
    for _ in range(ITERATIONS + 1):
        q_VK = torch.linalg.qr(_gram_times(m_VV, q_VK)).Q
    squares_K, u_KK = torch.linalg.eigh(q_VK.T @ _gram_times(m_VV, q_VK))
    top = squares_K.argsort(descending=True)[:rank]
    rows_VC = torch.zeros(vocab_size, width)
    rows_VC[:, :rank] = q_VK @ u_KK[:, top] * squares_K[top].clamp(min=0) ** 0.25
    # A random rotation: no coordinate is to be special.
    rows_VC @= torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    size_V = rows_VC.norm(dim=1, keepdim=True)
    random_VC = torch.randn(vocab_size, width, generator=generator)
    rows_VC = torch.where(size_V > 1e-6, rows_VC, random_VC)
    return rows_VC / rows_VC.square().mean(dim=1, keepdim=True).sqrt()


def _sample(ids: np.ndarray) -> np.ndarray:
    """All tokens, or pieces from everywhere in a long stream."""
    if len(ids) <= COUNTED_TOKENS:
        return ids.astype(np.int64)
    length = COUNTED_TOKENS // PIECES
    starts = np.linspace(0, len(ids) - length, PIECES).astype(np.int64)
    return np.concatenate([ids[s : s + length] for s in starts]).astype(np.int64)


def _mutual_information(ids: np.ndarray, vocab_size: int) -> Tensor:
    pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    of = np.bincount(ids, minlength=vocab_size) + 1.0
    information = np.log(counts * len(ids) / (of[first] * of[second]))
    kept = information > 0
    places = torch.from_numpy(np.stack((first[kept], second[kept])))
    values = torch.from_numpy(information[kept].astype(np.float32))
    shape = (vocab_size, vocab_size)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()


def _gram_times(m_VV: Tensor, x_VK: Tensor) -> Tensor:
    """``[M, Mᵀ] [M, Mᵀ]ᵀ x``."""
    t_VV = m_VV.t()
    product: Tensor = m_VV @ (t_VV @ x_VK) + t_VV @ (m_VV @ x_VK)
    return product
