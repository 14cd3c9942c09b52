"""How much memory a training step takes, by arithmetic: for the message when it runs out."""

from tinylm.config import ModelConfig, TrainConfig

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
    C, F = model.d_model, model.d_ff * (3 if model.activation == "swiglu" else 1)
    queries = 1 if model.kv_heads == model.n_heads else model.n_heads // model.kv_heads
    # In fp32, the residual stream twice; in the working precision: two normalised inputs, queries,
    # keys and values before and after norm and rotation, attention's output, the hidden layer.
    per_token = 2 * 4 * C + value_bytes * (2 * C + 3 * 3 * C * queries + C + 2 * F)
    per_layer = seq_len * per_token
    if scores:
        per_layer += 2 * 4 * model.n_heads * seq_len * seq_len
    return model.n_layers * per_layer + seq_len * 3 * 4 * C


def size(n_bytes: float) -> str:
    """``12 MB`` or ``3.4 GB``."""
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{max(1.0, n_bytes / 1e6):,.0f} MB"
