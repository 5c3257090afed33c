"""Rotary position embedding in the half-split layout: pairs are (i, i + D/2).

Su et al., RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(num_positions: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each fp32 [num_positions, head_dim / 2].

    Angles are formed in fp64: at position 8000 an fp32 product is off by 5e-4 radians.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), base**-exponent)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by the angle of its position; F = D / 2."""
    first, second = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
