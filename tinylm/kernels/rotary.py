"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Qwen."""

import torch
from torch import Tensor


def rotary_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos_TD and sin_TD (fp32) for positions 0 … max_seq_len - 1.

    Position t turns the pair (d, d + D/2) by the angle ``t * theta ** (-2 d / D)``.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    angles_TD = torch.cat((angles, angles), dim=-1)
    return angles_TD.cos().float(), angles_TD.sin().float()


def apply_rotary(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turns each head vector by the angle of its position; keeps the dtype of ``x_BHTD``."""
    first, second = x_BHTD.chunk(2, dim=-1)
    turned_BHTD = torch.cat((-second, first), dim=-1)
    return x_BHTD * cos_TD.to(x_BHTD.dtype) + turned_BHTD * sin_TD.to(x_BHTD.dtype)
