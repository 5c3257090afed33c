"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.model.linear import Linear


class MLP(nn.Module):
    """down(a(up(x))), a a squared ReLU or leaky ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim, init=config.matrix_init)
        self.down = Linear(config.mlp_dim, config.model_dim, init="zeros")
        self.activate = build_activation(config.leaky_slope)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out_BTC: Tensor = self.down(self.activate(self.up(x_BTC)))
        return out_BTC


def build_activation(leaky_slope: float) -> Callable[[Tensor], Tensor]:
    """relu(x)^2 (So et al., Primer, https://arxiv.org/abs/2109.08668) for slope 0, else
    leaky_relu(x)^2 (parameter-golf #493), which is positive on both sides and lets gradients of
    negative inputs through."""
    return partial(_leaky_relu_squared, leaky_slope) if leaky_slope else _relu_squared


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _leaky_relu_squared(slope: float, x: Tensor) -> Tensor:
    return F.leaky_relu(x, slope).square()
