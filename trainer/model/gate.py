"""Gates on the heads of attention, read from the block's normalised input n.

    "window"   y_h <- 2 sigmoid(w_h . n[:W]) y_h, from 1             parameter-golf #1667
    "dense"    y_h <- sigmoid(w_h . n) y_h, from about 1/2           #1736
    "sparse"   y_h <- sigmoid(s w_h . n[:W]) y_h, from 1/2           #1787
    "biased"   y_h <- sigmoid(w_h . n + b_h) y_h, from sigmoid(b)    #1212 (b = 4), #1894 (b = 1)

They come after XSA and before the output projection. (#1894 gates before XSA, which is the same:
XSA is linear in y. Its own runs had either off.)

Legend: B rows, T tokens, C model width, H query heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig


class HeadGate(nn.Module):
    """See the module's description."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        is_narrow = config.attn_gate in ("window", "sparse")
        num_in = config.attn_gate_dim if is_narrow else config.model_dim
        self.weight = nn.Parameter(torch.zeros(config.num_heads, num_in))
        if config.attn_gate == "dense":
            nn.init.normal_(self.weight, std=config.attn_gate_init_std)
        self.bias: nn.Parameter | None = None
        if config.attn_gate == "biased":
            self.bias = nn.Parameter(torch.full((config.num_heads,), config.attn_gate_bias_init))
        self._slope = config.attn_gate_scale if config.attn_gate == "sparse" else 1.0
        self._height = 2.0 if config.attn_gate == "window" else 1.0

    def forward(self, y_BTHD: Tensor, n_BTC: Tensor) -> Tensor:
        """The heads' output, gated."""
        seen = n_BTC[..., : self.weight.size(1)]
        score_BTH = self._slope * F.linear(seen, self.weight.to(n_BTC.dtype))
        if self.bias is not None:
            score_BTH = score_BTH + self.bias.to(n_BTC.dtype)
        return y_BTHD * (self._height * torch.sigmoid(score_BTH))[..., None]
