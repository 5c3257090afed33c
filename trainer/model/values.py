"""What changes a layer's values, or its output along them, beside the projection.

Legend: B rows, T tokens, H query heads, G value heads, D head width, K = G D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.model.linear import Linear


class HalfValueResidual(nn.Module):
    """v <- (v + v_0) / 2 without a gradient into v_0, the form of parameter-golf #675. The idea:
    Zhou et al., https://arxiv.org/abs/2410.17897"""

    def forward(self, v_BTGD: Tensor, first_BTGD: Tensor) -> Tensor:
        return 0.5 * v_BTGD + 0.5 * first_BTGD.detach()


class GatedValueResidual(nn.Module):
    """v <- (1 - g) v + g v_0, g = sigmoid(gate), one gate per layer, from -1.5 (#657)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((1,), -1.5))

    def forward(self, v_BTGD: Tensor, first_BTGD: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate).to(v_BTGD.dtype)
        return (1 - gate) * v_BTGD + gate * first_BTGD


class LearnedValueResidual(nn.Module):
    """v <- a v_0 + b v with free factors, both from 1/2 (an option of #1212)."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, v_BTGD: Tensor, first_BTGD: Tensor) -> Tensor:
        of_first, of_own = self.factors.to(v_BTGD.dtype)
        mixed_BTGD: Tensor = of_first * first_BTGD + of_own * v_BTGD
        return mixed_BTGD


VALUE_RESIDUALS: dict[str, type[nn.Module]] = {
    "half": HalfValueResidual,
    "gated": GatedValueResidual,
    "learned": LearnedValueResidual,
}


def build_value_residual(config: ModelConfig, layer: int) -> nn.Module | None:
    """The mixer of a layer; None in layer 0, whose values are the ones mixed in."""
    if config.value_residual == "off" or layer == 0:
        return None
    return VALUE_RESIDUALS[config.value_residual]()


class ValueProjection(nn.Module):
    """v_g <- v_g + 2 sigmoid(w_g . n[:W]) (P x0)_g: values straight from the embedding, each group
    with a gate read from the block's normalised input, from 1 (slowrun)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kv_width = config.num_kv_heads * config.head_dim
        self.proj = Linear(config.model_dim, kv_width, init=config.matrix_init)
        self.gate = Linear(config.value_proj_gate_dim, config.num_kv_heads, init="zeros")

    def forward(self, v_BTGD: Tensor, x0_BTC: Tensor, n_BTC: Tensor) -> Tensor:
        score_BTG = self.gate(n_BTC[..., : self.gate.weight.size(1)])
        gate_BTG1 = 2 * torch.sigmoid(score_BTG)[..., None]
        joined_BTGD: Tensor = v_BTGD + gate_BTG1 * self.proj(x0_BTC).view_as(v_BTGD)
        return joined_BTGD


class ValueEmbedScale(nn.Module):
    """v <- v + scale e: a layer's own factor on the value embeddings, from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, v_BTGD: Tensor, embed_BTK: Tensor) -> Tensor:
        return v_BTGD + self.scale.to(v_BTGD.dtype) * embed_BTK.view_as(v_BTGD)


class LearnedExclusion(nn.Module):
    """XSA of a learned strength per head, y - tanh(s) (y . n) n from s = 0 (slowrun, its tiny
    track)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(config.num_heads))

    def forward(self, out_BTHD: Tensor, v_BTGD: Tensor) -> Tensor:
        return exclude_own_value(out_BTHD, v_BTGD, torch.tanh(self.strength))


def exclude_own_value(out_BTHD: Tensor, v_BTGD: Tensor, strength_H: Tensor | None = None) -> Tensor:
    """XSA: each head's output without its part along the token's own value, y - (y . n) n with
    n = v / |v| of the head's group (parameter-golf #287); or with so much less of it."""
    unit_BTG1D = F.normalize(v_BTGD, dim=-1).unsqueeze(3)
    out_BTGRD = out_BTHD.reshape(*v_BTGD.shape[:3], -1, v_BTGD.size(3))
    along_BTGR1 = (out_BTGRD * unit_BTG1D).sum(-1, keepdim=True)
    if strength_H is not None:
        along_BTGR1 = along_BTGR1 * strength_H.to(out_BTHD.dtype).view(v_BTGD.size(2), -1, 1)
    return (out_BTGRD - along_BTGR1 * unit_BTG1D).flatten(2, 3)


def keep_output(out_BTHD: Tensor, v_BTGD: Tensor) -> Tensor:
    """What stands in for `exclude_own_value` where XSA is off."""
    return out_BTHD
