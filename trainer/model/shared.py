"""Blocks that are visited several times: shared matrices, scales and low-rank adapters per visit.

A small stack of blocks is run `num_loops` times over. The matrices are shared; visit l of a matrix
W computes x W^T + (x A_l) B_l with A_l [in, r] and B_l [r, out], and has its own attn_scale,
mlp_scale, resid_mix and q_gain (parameter-golf #675, first commits). There are no skips.

Legend: B rows, T tokens, C model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.model.attention import Context, SelfAttention
from trainer.model.block import block_scales
from trainer.model.lora import adapt, build_lora
from trainer.model.mlp import MLP
from trainer.model.norm import build_norm


class Visit(nn.Module):
    """What one visit of a block does not share with the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_scale, self.mlp_scale, self.resid_mix = block_scales(config)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.lora = build_lora(config, config.lora_rank, second_std=config.lora_init_std)

    def add(self, name: str, x: Tensor, product: Tensor) -> Tensor:
        """The product of x with a shared matrix, plus this visit's adapter of that matrix."""
        return adapt(self.lora, name, x, product)


class SharedAttention(SelfAttention):
    """SelfAttention whose gain and adapters come with the visit."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__(config, attend, layer)
        del self.q_gain

    def attend_for(self, visit: Visit, x_BTC: Tensor, context: Context) -> Tensor:
        """What attention adds in this visit, [B, T, C]."""
        weight = torch.cat((self.q.weight, self.k.weight, self.v.weight)).to(x_BTC.dtype)
        parts = torch.split(F.linear(x_BTC, weight), self._widths, dim=-1)
        adapted = [visit.add(name, x_BTC, part) for name, part in zip("qkv", parts, strict=True)]
        q_BTHD, k_BTGD, v_BTGD = self._heads(torch.cat(adapted, dim=-1))
        v_BTGD = self._join_values(v_BTGD, context)
        out_BTHD = self._attended(q_BTHD, k_BTGD, v_BTGD, visit.q_gain, context)
        out_BTC = self._exclude(out_BTHD, v_BTGD).flatten(2)
        return visit.add("out", out_BTC, self.out(out_BTC))


class SharedBlock(nn.Module):
    """A block without scales of its own; see Block for what it computes."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__()
        self.attn = SharedAttention(config, attend, layer)
        self.mlp = MLP(config)
        self._norm = build_norm(layer, config.ln_scale)

    def forward(self, visit: Visit, x_BTC: Tensor, context: Context) -> Tensor:
        """The residual stream after this visit."""
        dtype = x_BTC.dtype
        keep_C, mix_C = visit.resid_mix.to(dtype)
        x_BTC = keep_C * x_BTC + mix_C * context.x0_BTC
        attended_BTC = self.attn.attend_for(visit, self._norm(x_BTC), context)
        x_BTC = x_BTC + visit.attn_scale.to(dtype) * attended_BTC
        h_BTC = self._norm(x_BTC)
        hidden = self.mlp.activate(visit.add("up", h_BTC, self.mlp.up(h_BTC)))
        mixed_BTC = visit.add("down", hidden, self.mlp.down(hidden))
        return x_BTC + visit.mlp_scale.to(dtype) * mixed_BTC
