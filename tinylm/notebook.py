"""The weights file of the notebook that tinylm grew from: ``simple_transformer.pth``.

Its model is an ``nn.MultiheadAttention``, two ``nn.Linear`` of a feed-forward layer, two
``nn.LayerNorm`` after them, an embedding and an output layer; the file is that module's state
dict. Only tensors are read: a file that holds any other object is refused.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import InputError
from tinylm.files import atomic_write
from tinylm.model import Transformer

# Their name -> ours.
NAMES = {
    "embedding.weight": "embedding.weight",
    "attention.in_proj_weight": "blocks.0.attention.qkv.weight",
    "attention.in_proj_bias": "blocks.0.attention.qkv.bias",
    "attention.out_proj.weight": "blocks.0.attention.out.weight",
    "attention.out_proj.bias": "blocks.0.attention.out.bias",
    "feedforward.0.weight": "blocks.0.feed_forward.up.weight",
    "feedforward.0.bias": "blocks.0.feed_forward.up.bias",
    "feedforward.2.weight": "blocks.0.feed_forward.down.weight",
    "feedforward.2.bias": "blocks.0.feed_forward.down.bias",
    "output.weight": "head.weight",
    "output.bias": "head.bias",
    "norm1.weight": "blocks.0.norm1.weight",
    "norm1.bias": "blocks.0.norm1.bias",
    "norm2.weight": "blocks.0.norm2.weight",
    "norm2.bias": "blocks.0.norm2.bias",
}


def load_state_dict(path: str | os.PathLike[str], n_heads: int = 4) -> Transformer:
    """The ``notebook`` model with the weights of a ``.pth`` file; sizes are read from the file.

    Raises:
        InputError: no such file, not a state dict, or not of this model.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes may be in the file, and anything come of reading them
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path} is not a file of plain tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} does not hold a state dict (names and tensors)")
    missing, extra = sorted(NAMES.keys() - state.keys()), sorted(state.keys() - NAMES.keys())
    if missing or extra:
        raise InputError(
            f"{path} is not the notebook's model: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(extra) or 'nothing'}"
        )
    model = Transformer(_config(state, n_heads))
    try:
        model.load_state_dict({ours: state[theirs].float() for theirs, ours in NAMES.items()})
    except RuntimeError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    return model


def save_state_dict(model: Transformer, path: str | os.PathLike[str]) -> None:
    """Writes a ``notebook`` model as the notebook does; `InputError` for any other model."""
    ours = model.state_dict()
    if set(ours) != set(NAMES.values()) or model.config.causal:
        raise InputError("only a model of the notebook preset can be saved as the notebook's .pth")
    with atomic_write(path) as file:
        torch.save({theirs: ours[name].detach().cpu() for theirs, name in NAMES.items()}, file)


def _config(state: dict[str, Tensor], n_heads: int) -> ModelConfig:
    from dataclasses import replace

    vocab_size, d_model = state["embedding.weight"].shape
    d_ff = state["feedforward.0.weight"].shape[0]
    base = TrainConfig.from_preset("notebook").model
    return replace(base, vocab_size=vocab_size, d_model=d_model, d_ff=d_ff, n_heads=n_heads)
