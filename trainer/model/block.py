"""One transformer block and how it joins the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.model.attention import SelfAttention
from trainer.model.mlp import MLP
from trainer.model.norm import rms_norm


class Block(nn.Module):
    """x <- m0 x + m1 x0; x <- x + a Attn(rms x); x <- x + b MLP(rms x), per-channel m, a, b.

    x0 is the normalised embedding, which every block may mix in again.
    """

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        width = config.model_dim
        self.attn = SelfAttention(config, attend)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(width))
        self.mlp_scale = nn.Parameter(torch.ones(width))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(width), torch.zeros(width))))

    def forward(self, x_BTC: Tensor, x0_BTC: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        dtype = x_BTC.dtype
        keep_C, mix_C = self.resid_mix.to(dtype)
        x_BTC = keep_C * x_BTC + mix_C * x0_BTC
        attended_BTC = self.attn(rms_norm(x_BTC), cos_TF, sin_TF)
        x_BTC = x_BTC + self.attn_scale.to(dtype) * attended_BTC
        mixed_BTC: Tensor = self.mlp(rms_norm(x_BTC))
        return x_BTC + self.mlp_scale.to(dtype) * mixed_BTC
