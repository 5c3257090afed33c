"""The feed-forward part of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.model.linear import Linear


class MLP(nn.Module):
    """down(relu(up(x))^2), squared ReLU of So et al., Primer, https://arxiv.org/abs/2109.08668"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim)
        self.down = Linear(config.mlp_dim, config.model_dim, zero_init=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out_BTC: Tensor = self.down(F.relu(self.up(x_BTC)).square())
        return out_BTC
