"""Writing a model for other programs. ``modern`` is the architecture of Qwen3ForCausalLM."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tinylm.config import ModelConfig
from tinylm.errors import InputError
from tinylm.files import atomic_write, write_json
from tinylm.lm import LanguageModel

# What of ours has a place in Qwen3ForCausalLM.
_QWEN3 = {
    "causal": True, "positions": "rope", "norm": "rms", "pre_norm": True, "activation": "swiglu",
    "bias": False, "qk_norm": True,
}  # fmt: skip


def export_huggingface(lm: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that ``transformers`` loads without remote code.

    It holds ``config.json``, ``model.safetensors`` and the tokenizer. Only the architecture of
    the ``modern`` preset (in any size) has a counterpart there.

    Raises:
        InputError: another architecture, or a folder that holds other files.
    """
    config, out = lm.model.config, Path(folder)
    differing = [name for name, value in _QWEN3.items() if getattr(config, name) != value]
    if differing:
        raise InputError(
            f"the {lm.config.preset} preset has no counterpart in transformers (it differs in "
            f"{', '.join(differing)}); train the modern preset to export it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; choose another --out")
    with atomic_write(out / "model.safetensors") as file:
        file.write(save(qwen3_tensors(config, lm.model.state_dict()), {"format": "pt"}))
    lm.tokenizer.save(out / "tokenizer.json")
    write_json(out / "config.json", qwen3_config(config, lm.tokenizer.eos_id))
    eos = lm.tokenizer.id_to_token(lm.tokenizer.eos_id)
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos},
    )
    write_json(
        out / "generation_config.json",
        {"eos_token_id": lm.tokenizer.eos_id, "pad_token_id": lm.tokenizer.eos_id},
    )


def qwen3_config(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """The model's ``config.json`` for transformers."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
    }


def qwen3_tensors(config: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under transformers' names, packed projections taken apart."""
    out = {"model.embed_tokens.weight": ours["embedding.weight"]}
    out["model.norm.weight"] = ours["norm.weight"]
    if not config.tie_embeddings:
        out["lm_head.weight"] = ours["head.weight"]
    rows = [n * config.head_dim for n in (config.n_heads, config.kv_heads, config.kv_heads)]
    for i in range(config.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = ours[a + "attention.qkv.weight"].split(rows)  # type: ignore[no-untyped-call]
        gate, up = ours[a + "feed_forward.up.weight"].chunk(2)
        out |= {
            b + "input_layernorm.weight": ours[a + "norm1.weight"],
            b + "self_attn.q_proj.weight": q,
            b + "self_attn.k_proj.weight": k,
            b + "self_attn.v_proj.weight": v,
            b + "self_attn.o_proj.weight": ours[a + "attention.out.weight"],
            b + "self_attn.q_norm.weight": ours[a + "attention.q_norm.weight"],
            b + "self_attn.k_norm.weight": ours[a + "attention.k_norm.weight"],
            b + "post_attention_layernorm.weight": ours[a + "norm2.weight"],
            b + "mlp.gate_proj.weight": gate,
            b + "mlp.up_proj.weight": up,
            b + "mlp.down_proj.weight": ours[a + "feed_forward.down.weight"],
        }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in out.items()}
