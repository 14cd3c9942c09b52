"""The peer of `bench_train`: the presets' models and a training loop as anyone would write them.

Standard torch modules, scaled_dot_product_attention, F.cross_entropy on all logits, torch's AdamW,
windows drawn at random from the token file: the loop that nanoGPT made familiar. Parameters have
the names that tinylm gives them, so that both sides can start from the same weights.
"""

import math
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def norm(config, width):
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = norm(config, config.head_dim)
            self.k_norm = norm(config, config.head_dim)

    def forward(self, x, rotary):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.config.n_heads, self.config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotary is not None:
            q, k = (rotate(x, *(table[:T] for table in rotary)) for x in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.d_model, config.d_ff * (1 + self.gated), bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.relu(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm1, self.attention = norm(config, config.d_model), Attention(config)
        self.norm2, self.feed_forward = norm(config, config.d_model), FeedForward(config)

    def forward(self, x, rotary):
        if self.pre_norm:
            x = x + self.attention(self.norm1(x), rotary)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attention(x, rotary))
        return self.norm2(x + self.feed_forward(x))


class PlainModel(nn.Module):
    """The model of a `tinylm.ModelConfig` with a causal mask and no grouped heads."""

    def __init__(self, config):
        super().__init__()
        if not config.causal or config.kv_heads != config.n_heads:
            raise ValueError("the plain model is causal and has as many key heads as query heads")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = norm(config, config.d_model) if config.pre_norm else nn.Identity()
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.bias)
        pair = torch.arange(0, config.head_dim, 2) / config.head_dim
        angle = torch.outer(torch.arange(config.max_seq_len), config.rope_theta**-pair).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, targets):
        x = self.embedding(ids)
        if self.config.positions == "learned":
            x = x + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        rotary = (self.cos, self.sin) if self.config.positions == "rope" else None
        for block in self.blocks:
            x = block(x, rotary)
        x = self.norm(x)
        tied = self.config.tie_embeddings
        logits = F.linear(x, self.embedding.weight) if tied else self.head(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class PlainLoop:
    """Forward, backward, clip, AdamW; reads the loss every tenth step."""

    def __init__(self, model, tokens, batch_size, seq_len, dtype, compiled):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self.where = next(model.parameters()).device
        self.model = torch.compile(model) if compiled else model
        cuda = self.where.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
        )
        self.scaler = torch.amp.GradScaler(self.where.type, enabled=dtype == torch.float16)
        plain = dtype == torch.float32
        self.autocast = nullcontext() if plain else torch.autocast(self.where.type, dtype)
        self.random = np.random.default_rng(0)
        self.steps, self.loss = 0, math.nan

    def batch(self):
        T = self.seq_len
        starts = self.random.integers(0, len(self.tokens) - T - 1, self.batch_size)
        x = torch.stack([torch.from_numpy(self.tokens[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(self.tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )
        if self.where.type == "cuda":
            return (t.pin_memory().to(self.where, non_blocking=True) for t in (x, y))
        return x, y

    def step(self):
        x, y = self.batch()
        with self.autocast:
            loss = self.model(x, y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % 10 == 0:
            self.loss = loss.item()
