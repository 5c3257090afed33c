"""One transformer block and how it joins the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.model.attention import Context, SelfAttention
from trainer.model.differential import DifferentialAttention
from trainer.model.mlp import MLP
from trainer.model.norm import build_norm


class Block(nn.Module):
    """x <- m0 x + m1 x0; x <- p x + a Attn(n x); x <- r x + b MLP(n x).

    m, a, b are per channel; n is the norm, scaled where `ln_scale` is on; p, r are residual
    lambdas, 1 where they are off. x0 is the normalised embedding, which every block may mix in
    again.
    """

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__()
        attention = SelfAttention if config.diff_attention == "off" else DifferentialAttention
        self.attn = attention(config, attend, layer)
        self.mlp = MLP(config)
        self.attn_scale, self.mlp_scale, self.resid_mix = block_scales(config)
        self.resid_lambdas: nn.Parameter | None = None
        if config.resid_lambda_init:
            self.resid_lambdas = nn.Parameter(torch.full((2,), config.resid_lambda_init))
        self._norm = build_norm(layer, config.ln_scale)

    def forward(self, x_BTC: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The residual stream after the block, and the values of its attention as projected."""
        dtype = x_BTC.dtype
        keep_C, mix_C = self.resid_mix.to(dtype)
        x_BTC = keep_C * x_BTC + mix_C * context.x0_BTC
        attended_BTC, value_BTGD = self.attn(self._norm(x_BTC), context)
        x_BTC = self._kept(x_BTC, 0) + self.attn_scale.to(dtype) * attended_BTC
        h_BTC = self._norm(x_BTC)
        mixed_BTC = self.mlp(h_BTC)
        if context.adapters is not None:
            mixed_BTC = context.adapters.add("mlp", h_BTC, mixed_BTC)
        x_BTC = self._kept(x_BTC, 1) + self.mlp_scale.to(dtype) * mixed_BTC
        return x_BTC, value_BTGD

    def _kept(self, x_BTC: Tensor, addition: int) -> Tensor:
        if self.resid_lambdas is None:
            return x_BTC
        return self.resid_lambdas[addition].to(x_BTC.dtype) * x_BTC


def block_scales(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """attn_scale and mlp_scale [C], resid_mix [2, C], as a block begins with them."""
    one, zero = torch.ones(config.model_dim), torch.zeros(config.model_dim)
    start = config.layer_scale_init
    return (
        nn.Parameter(start * one),
        nn.Parameter(start * one),
        nn.Parameter(torch.stack((one, zero))),
    )
