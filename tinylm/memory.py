"""How much memory a training step takes, by arithmetic: for the message when it runs out."""

from tinylm.config import ModelConfig, TrainConfig
from tinylm.device import Device
from tinylm.kernels.attention import BLOCK_QUERIES
from tinylm.kernels.dispatch import select

GB = 1e9


def fixed_bytes(config: TrainConfig, parameters: int) -> int:
    """Weights, gradients and the optimizer's state, all fp32; does not depend on the batch.

    AdamW keeps two values for each parameter; Muon keeps one for those of the blocks' matrices,
    which is counted as two here.
    """
    return 4 * 4 * parameters


def window_bytes(model: ModelConfig, seq_len: int, device: Device) -> int:
    """What the forward pass of one window keeps for the backward pass, roughly."""
    C, F = model.d_model, model.d_ff
    value_bytes = 4 if device.precision == "fp32" else 2
    # In fp32, the residual stream twice.
    stream, outside = 2 * 4 * C, seq_len * 3 * 4 * C
    if _normalised_again(model, device):
        # Queries, keys and values, the first two again after their norm and rotation, the
        # attention's output, and the hidden layer's gates and values.
        per_layer = seq_len * (stream + value_bytes * ((3 + 2 + 1) * C + 2 * F))
        return model.n_layers * per_layer + outside
    # In the working precision two normalised inputs, the attention's output, queries, keys and
    # values, those again for each thing done to them, and the hidden layer.
    heads = 3 + 2 * model.qk_norm + 2 * (model.positions == "rope")
    hidden = 4 if model.activation == "swiglu" else 1
    per_layer = seq_len * (stream + value_bytes * ((3 + heads) * C + hidden * F))
    if device.type == "cpu":  # attention by plain matrix products keeps its weights
        if model.causal:  # in blocks of queries, none with the keys after it
            keys = (seq_len + min(seq_len, BLOCK_QUERIES)) // 2
            per_layer += value_bytes * model.n_heads * seq_len * keys
        else:
            per_layer += (4 + value_bytes % 4) * model.n_heads * seq_len * seq_len
    return model.n_layers * per_layer + outside


def _normalised_again(model: ModelConfig, device: Device) -> bool:
    """Whether the C++ operators of ``modern`` run, backwards from what they were given."""
    own = model.norm == "rms" and model.activation == "swiglu" and not model.bias
    own = own and model.causal and device.type == "cpu" and device.precision == "bf16"
    return own and select("norm_linear", device.name).implementation == "c++"


def advice(config: TrainConfig, micro_batch_size: int, parameters: int, device: Device) -> str:
    """What to say when memory has run out."""
    fixed, micro = fixed_bytes(config, parameters), micro_batch_size
    window = window_bytes(config.model, config.seq_len, device)
    return (
        f"out of memory with {micro} windows (of --batch-size {config.batch_size}) of "
        f"{config.seq_len} tokens (--seq-len) at once: about {size(fixed)} for weights, "
        f"gradients and optimizer and {size(window)} for each window, {size(window * micro)} "
        "in all; lower --micro-batch-size (the result stays the same), or --seq-len"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception of its own for GPUs only; a CPU's says it in words."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(
        words in text
        for words in ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def size(n_bytes: float) -> str:
    """``12 MB`` or ``3.4 GB``."""
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{max(1.0, n_bytes / 1e6):,.0f} MB"
