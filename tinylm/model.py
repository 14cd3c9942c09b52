"""The decoder-only transformer: one class, and three presets of it (`tinylm.config.PRESETS`).

Shape suffixes as in `tinylm.kernels`: ``B`` batch, ``T`` time, ``H`` heads, ``D`` head dimension,
``C`` model width, ``F`` feed-forward width, ``V`` vocabulary, ``N = B * T``.

``modern`` has the architecture of Qwen3ForCausalLM; ``notebook`` that of a one-layer encoder
without mask or positions; ``causal`` is the notebook's with both.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm import kernels
from tinylm.config import ModelConfig
from tinylm.errors import InputError
from tinylm.kernels.dispatch import autocast_dtype


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, of every layer, in buffers of fixed size."""

    k_LBHSD: Tensor
    v_LBHSD: Tensor
    length: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, like: Tensor) -> "KVCache":
        shape = (config.n_layers, batch, config.kv_heads, config.max_seq_len, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new positions of one layer; returns all its keys and values so far."""
        end = self.length + k_BHTD.shape[2]
        self.k_LBHSD[layer, :, :, self.length : end] = k_BHTD
        self.v_LBHSD[layer, :, :, self.length : end] = v_BHTD
        return self.k_LBHSD[layer, :, :, :end], self.v_LBHSD[layer, :, :, :end]


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.Module):
    """``before_product``: nothing but a matrix product takes the result, in autocast's dtype."""

    def __init__(self, width: int, eps: float, before_product: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.before_product = eps, before_product

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) if self.before_product else None
        return kernels.rms_norm(x, self.weight, eps=self.eps, dtype=dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps, before_product=config.pre_norm)
    return LayerNorm(config.d_model, config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.n_heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.d_model, heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x_BTC: Tensor,
        layer: int,
        rotary_TD: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        start_BT: Tensor | None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """With a norm, x + the attention of norm(x)."""
        B, T, C = x_BTC.shape
        H, H_kv = self.config.n_heads, self.config.kv_heads
        qkv_BTHD = self._projected(x_BTC, norm).view(B, T, -1, self.config.head_dim)
        qk_BTHD, v_BTHD = torch.split(qkv_BTHD, [H + H_kv, H_kv], dim=2)
        qk_BHTD = self._placed(qk_BTHD, rotary_TD).transpose(1, 2)
        v_BHTD = v_BTHD.transpose(1, 2)
        q, k = torch.split(qk_BHTD, [H, H_kv], dim=1)
        if cache is not None:
            k, v_BHTD = cache.append(layer, k, v_BHTD)
        out_BHTD = kernels.causal_attention(
            q, k, v_BHTD, causal=self.config.causal, start_BT=start_BT
        )
        out_BTC = out_BHTD.transpose(1, 2).reshape(B, T, C)
        if norm is not None and not self.config.bias:
            return kernels.linear_residual(x_BTC, out_BTC, self.out.weight)
        projected_BTC: Tensor = self.out(out_BTC)
        return projected_BTC if norm is None else x_BTC + projected_BTC

    def _projected(self, x_BTC: Tensor, norm: nn.Module | None) -> Tensor:
        """Queries, keys and values."""
        if isinstance(norm, RMSNorm) and not self.config.bias:
            return kernels.norm_linear(x_BTC, norm.weight, self.qkv.weight, norm.eps)
        qkv: Tensor = self.qkv(x_BTC if norm is None else norm(x_BTC))
        return qkv

    def _placed(self, qk_BTHD: Tensor, rotary_TD: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries and keys after their norm and rotation, one call for both."""
        if not self.config.qk_norm:
            if rotary_TD is None:
                return qk_BTHD
            return kernels.apply_rotary(qk_BTHD.transpose(1, 2), *rotary_TD).transpose(1, 2)
        H, H_kv, eps = self.config.n_heads, self.config.kv_heads, self.config.norm_eps
        weights = self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(H_kv, -1)
        weight_HD = torch.cat(weights)
        if rotary_TD is None:
            return kernels.rms_norm(qk_BTHD, weight_HD, eps=eps)
        return kernels.norm_rotary(qk_BTHD, weight_HD, *rotary_TD, eps)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.biased = config.activation == "swiglu", config.bias
        self.up = nn.Linear(config.d_model, config.d_ff * (1 + self.gated), bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BTC: Tensor, norm: nn.Module | None = None) -> Tensor:
        """With a norm, x + the layer of norm(x)."""
        if norm is None:
            return self._layer(x_BTC)
        if self.gated and not self.biased and isinstance(norm, RMSNorm):
            weights = norm.weight, self.up.weight, self.down.weight
            return kernels.feed_forward(x_BTC, *weights, norm.eps)
        return x_BTC + self._layer(norm(x_BTC))

    def _layer(self, x_BTC: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTC)
        if self.gated:  # SwiGLU (Shazeer 2020)
            return self.down(kernels.swiglu(hidden_BTF))  # type: ignore[no-any-return]
        return self.down(F.relu(hidden_BTF))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm1, self.attention = make_norm(config), Attention(config)
        self.norm2, self.feed_forward = make_norm(config), FeedForward(config)

    def forward(
        self,
        x_BTC: Tensor,
        layer: int,
        rotary_TD: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        start_BT: Tensor | None,
    ) -> Tensor:
        if self.pre_norm:
            x_BTC = self.attention(x_BTC, layer, rotary_TD, cache, start_BT, self.norm1)
            return self.feed_forward(x_BTC, self.norm2)  # type: ignore[no-any-return]
        x_BTC = self.norm1(x_BTC + self.attention(x_BTC, layer, rotary_TD, cache, start_BT))
        return self.norm2(x_BTC + self.feed_forward(x_BTC))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A language model: ids of tokens in, logits of each next token out.

    Args:
        config: the architecture.
        seed: of the initial weights, which do not depend on the global random state.
    """

    cos_SD: Tensor
    sin_SD: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            if config.positions == "learned":
                self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.norm = make_norm(config) if config.pre_norm else nn.Identity()
            if not config.tie_embeddings:
                self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.bias)
            self._init_weights()
        cos, sin = kernels.rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos_SD", cos, persistent=False)
        self.register_buffer("sin_SD", sin, persistent=False)

    @torch.no_grad()
    def _init_weights(self) -> None:
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        if not self.config.pre_norm:  # the notebook's: torch's defaults, as nn.MultiheadAttention
            for block in blocks:
                nn.init.xavier_uniform_(block.attention.qkv.weight)
                nn.init.zeros_(block.attention.qkv.bias)
                nn.init.zeros_(block.attention.out.bias)
            return
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.config.positions == "learned":
            nn.init.normal_(self.position_embedding.weight, std=0.02)
        for block in blocks:
            for linear in (block.attention.qkv, block.feed_forward.up):
                # Half the usual scale, variance 1 / (4 in_features): docs/recipe.md.
                bound = 0.5 * math.sqrt(3 / linear.in_features)
                nn.init.uniform_(linear.weight, -bound, bound)
            # Each block starts as the identity (Goyal et al. 2017; muP practice).
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    @property
    def head_weight_VC(self) -> Tensor:
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    @property
    def head_bias_V(self) -> Tensor | None:
        return None if self.config.tie_embeddings else self.head.bias

    def parameter_count(self) -> int:
        """Number of trained values; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(
        self, ids_BT: Tensor, cache: KVCache | None = None, start_BT: Tensor | None = None
    ) -> Tensor:
        """Final hidden states h_BTC, before the head.

        Args:
            ids_BT: token ids; with a cache, those after the cached positions.
            cache: read and extended in place.
            start_BT: index of the first token that each one sees, in its sequence; None for 0. Of
                left padding it is (B, 1), of packed documents `tinylm.kernels.document_starts`.

        Raises:
            InputError: the positions would pass ``max_seq_len`` (models with positions only).
        """
        T, past = ids_BT.shape[1], 0 if cache is None else cache.length
        if past + T > self.config.max_seq_len and (cache or self.config.positions != "none"):
            raise InputError(
                f"{past + T} positions are more than the model's max_seq_len "
                f"{self.config.max_seq_len}; shorten the context"
            )
        x_BTC = self.embedding(ids_BT)
        if self.config.positions == "learned":
            position_BT = torch.arange(past, past + T, device=ids_BT.device)[None]
            if start_BT is not None:
                position_BT = (position_BT - start_BT).clamp(min=0)
            x_BTC = x_BTC + self.position_embedding(position_BT)
        rotary_TD = None
        if self.config.positions == "rope":
            rotary_TD = self.cos_SD[past : past + T], self.sin_SD[past : past + T]
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, layer, rotary_TD, cache, start_BT)
        if cache is not None:
            cache.length += T
        return self.norm(x_BTC)  # type: ignore[no-any-return]

    def logits(self, h: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, C)."""
        return F.linear(h, self.head_weight_VC, self.head_bias_V)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV: at each position, of the token after it."""
        return self.logits(self.hidden(ids_BT))

    def loss(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        *,
        start_BT: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy in nats per target; targets of -100 count nowhere.

        Args:
            start_BT: as in `hidden`; of packed documents, that none may see another.
            z_loss: as in `tinylm.kernels.linear_cross_entropy`.
        """
        h_NC = self.hidden(ids_BT, start_BT=start_BT).flatten(0, 1)
        return kernels.linear_cross_entropy(
            h_NC,
            self.head_weight_VC,
            targets_BT.flatten(),
            z_loss=z_loss,
            bias_V=self.head_bias_V,
        )

    def matrices(self) -> dict[str, int]:
        """Names of the blocks' weight matrices, and how many separate maps each one stacks.

        The packed query, key and value (or gate and value) projections are one tensor for speed;
        an optimizer that looks at matrices as wholes has to see them apart.
        """
        stacked = {"qkv": 3 if self.config.kv_heads == self.config.n_heads else 1}
        stacked["up"] = 2 if self.config.activation == "swiglu" else 1
        return {
            name: stacked.get(name.split(".")[-2], 1)
            for name, parameter in self.named_parameters()
            if name.startswith("blocks.") and parameter.dim() == 2
        }
