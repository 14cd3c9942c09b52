"""How much memory a training step takes, by arithmetic: for the message when it runs out."""

from tinylm.config import ModelConfig, TrainConfig
from tinylm.kernels.attention import BLOCK_QUERIES

GB = 1e9


def fixed_bytes(config: TrainConfig, parameters: int) -> int:
    """Weights, gradients and the optimizer's state, all fp32; does not depend on the batch.

    AdamW keeps two values for each parameter; Muon keeps one for those of the blocks' matrices,
    which is counted as two here.
    """
    return 4 * 4 * parameters


def window_bytes(model: ModelConfig, seq_len: int, value_bytes: int, scores: bool) -> int:
    """What the forward pass of one window keeps for the backward pass, roughly.

    Args:
        value_bytes: 4 in fp32, 2 in bf16 and fp16.
        scores: whether attention keeps its T × T weights, as plain matrix products do.
    """
    C, F = model.d_model, model.d_ff
    # In fp32, the residual stream twice; in the working precision two normalised inputs, the
    # attention's output, queries, keys and values, those again for each thing done to them, and
    # the hidden layer.
    heads = 3 + 2 * model.qk_norm + 2 * (model.positions == "rope")
    hidden = 4 if model.activation == "swiglu" else 1
    per_layer = seq_len * (2 * 4 * C + value_bytes * ((3 + heads) * C + hidden * F))
    if scores:
        if model.causal:  # in blocks of queries, none with the keys after it
            keys = (seq_len + min(seq_len, BLOCK_QUERIES)) // 2
            per_layer += value_bytes * model.n_heads * seq_len * keys
        else:
            per_layer += (4 + value_bytes % 4) * model.n_heads * seq_len * seq_len
    return model.n_layers * per_layer + seq_len * 3 * 4 * C


def size(n_bytes: float) -> str:
    """``12 MB`` or ``3.4 GB``."""
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{max(1.0, n_bytes / 1e6):,.0f} MB"
