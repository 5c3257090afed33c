"""Multi-token prediction: one more block that predicts the token after the next, in training only.

DeepSeek-V3 (https://arxiv.org/abs/2412.19437), as slowrun runs it. With h_t the final normalised
state and y_t the next token,

    m_t = M [h_t ; rms(E[y_t])];  n_t = rms(Block(m)_t);  loss + w CE(softcap(n_t W), y_(t+1))

E and W are those of the model, and gradients flow into them and into h. The block attends to
everything before, has no window, no values from the embedding and does not mix it in. A row's last
place runs along and is left out of the loss: it comes after all others, so nothing sees it.

Legend: B rows, T tokens, C model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.config.next_token import config_of_block
from trainer.model.attention import Context
from trainer.model.block import Block
from trainer.model.linear import Linear
from trainer.model.norm import rms_norm


class NextTokenBlock(nn.Module):
    """See the module's description."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        layer = config.num_layers
        self.merge = Linear(2 * config.model_dim, config.model_dim, init="zeros")
        # Of deviation 1 / sqrt(C), though 2 C go in.
        bound = math.sqrt(3 / config.model_dim)
        nn.init.uniform_(self.merge.weight, -bound, bound)
        self.block = Block(config_of_block(config), attend, layer)
        self.block.drop_chance = config.stoch_depth * layer / max(1, layer - 1)

    def forward(self, hidden_BTC: Tensor, next_BTC: Tensor, context: Context) -> Tensor:
        """What the head multiplies for the token after the next, [B, T, C].

        Args:
            hidden_BTC: the model's final state, normalised.
            next_BTC: the normalised embedding of the next token.
        """
        merged_BTC = self.merge(torch.cat((hidden_BTC, next_BTC), dim=-1))
        return rms_norm(self.block(merged_BTC, context)[0])
