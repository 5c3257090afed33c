"""One transformer block and how it joins the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.model.attention import Context, SelfAttention
from trainer.model.differential import DifferentialAttention
from trainer.model.iha import FusedHeads, InterleavedHeads
from trainer.model.lanes import build_lanes
from trainer.model.mlp import MLP
from trainer.model.norm import build_norm
from trainer.model.recurrence import Repeat


class Block(nn.Module):
    """x <- m0 x + m1 x0; x <- p x + a Attn(n x); x <- r x + b MLP(n x).

    m, a, b are per channel; n is the norm, scaled where `ln_scale` is on; p, r are residual
    lambdas, 1 where they are off. x0 is the normalised embedding, which every block may mix in
    again. From `parallel_start` on attention and MLP may stand side by side instead:

        joint   x <- m0 x + m1 x0; x <- x + a Attn(n x) + b MLP(n x)
        lanes   see Lanes
    """

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__()
        attn = _attention_of(config, layer)(
            config, attend, layer
        )  # also where it is thrown away: it draws numbers
        self.attn = attn if config.attends(layer) else None
        self.mlp = MLP(config)
        attn_scale, mlp_scale, resid_mix = block_scales(config)
        has_scales = config.branch_scales == "channel"
        self.attn_scale = attn_scale if config.attends(layer) and has_scales else None
        self.mlp_scale = mlp_scale if has_scales else None
        self.resid_mix = resid_mix if config.resid_mix == "channel" else None
        self.keep_factor: nn.Parameter | None = None
        self.embed_factor: nn.Parameter | None = None
        if config.resid_mix == "scalar":  # two tensors, because they learn at rates of their own
            self.keep_factor = nn.Parameter(torch.full((1,), config.resid_keep_init))
            self.embed_factor = nn.Parameter(torch.full((1,), config.embed_mix_init))
        self.layer_scale: nn.Parameter | None = None
        if config.layer_scale:
            start = torch.full((config.model_dim,), config.layer_scale_init)
            self.layer_scale = nn.Parameter(start)
        self.resid_lambdas: nn.Parameter | None = None
        if config.resid_lambda_init:
            self.resid_lambdas = nn.Parameter(torch.full((2,), config.resid_lambda_init))
        self.lanes = build_lanes(config, layer)
        self.repeats = nn.ModuleList()
        """Set by the model when all else has its initial weights."""
        self._norm = build_norm(layer, config.ln_scale)
        self._attn_dropout, self._mlp_dropout = config.attn_dropout, config.mlp_dropout
        self.drop_chance = config.stoch_depth * layer / max(1, config.num_layers - 1)
        """That a training pass leaves the block out (Huang et al., arXiv:1603.09382)."""
        is_joint = config.parallel == "joint" and config.is_parallel(layer)
        self._run = self._side_by_side if is_joint else self._one_by_one

    def forward(
        self, x_BTC: Tensor, context: Context, repeat: Repeat | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the block, and the values of its attention as projected.

        Args:
            repeat: what this visit has of its own; None for the first.
        """
        x_BTC = self._mixed(x_BTC, context)
        y_BTC, value_BTGD = self._run(x_BTC, context, repeat)
        if self.drop_chance and context.is_noisy:
            # Both ways are computed, so that there is one graph and nothing to wait for.
            is_kept = torch.rand((), device=x_BTC.device) >= self.drop_chance
            y_BTC = torch.where(is_kept, y_BTC, x_BTC)
        return y_BTC, value_BTGD

    def in_lanes(
        self, first_BTC: Tensor, second_BTC: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both lanes after the block, and the values of its attention as projected. Only what
        attention reads has the embedding mixed in."""
        assert self.lanes is not None
        attended, value_BTGD = self._attended(self._mixed(first_BTC, context), context, None)
        transformed_BTC = self._transformed(second_BTC, context, None)
        first_BTC, second_BTC = self.lanes(first_BTC, second_BTC, attended, transformed_BTC)
        return first_BTC, second_BTC, value_BTGD

    def repeat(self, visit: int) -> Repeat:
        """What a visit after the first, number 0, has of its own."""
        repeat = self.repeats[visit - 1]
        assert isinstance(repeat, Repeat)
        return repeat

    def _mixed(self, x_BTC: Tensor, context: Context) -> Tensor:
        if self.keep_factor is not None and self.embed_factor is not None:
            keep_C, mix_C = self.keep_factor.to(x_BTC.dtype), self.embed_factor.to(x_BTC.dtype)
        elif self.resid_mix is not None:
            keep_C, mix_C = self.resid_mix.to(x_BTC.dtype)
        else:
            return x_BTC
        mixed_BTC: Tensor = keep_C * x_BTC + mix_C * context.x0_BTC
        return mixed_BTC

    def _one_by_one(
        self, x_BTC: Tensor, context: Context, repeat: Repeat | None
    ) -> tuple[Tensor, Tensor | None]:
        attended_BTC, value_BTGD = self._attended(x_BTC, context, repeat)
        x_BTC = self._kept(x_BTC, 0) + attended_BTC
        x_BTC = self._kept(x_BTC, 1) + self._transformed(x_BTC, context, repeat)
        return x_BTC, value_BTGD

    def _side_by_side(
        self, x_BTC: Tensor, context: Context, repeat: Repeat | None
    ) -> tuple[Tensor, Tensor | None]:
        attended_BTC, value_BTGD = self._attended(x_BTC, context, repeat)
        return x_BTC + attended_BTC + self._transformed(x_BTC, context, repeat), value_BTGD

    def _attended(
        self, x_BTC: Tensor, context: Context, repeat: Repeat | None
    ) -> tuple[Tensor | float, Tensor | None]:
        """What attention adds, and the values as projected; 0 and None where there is none."""
        if self.attn is None:
            return 0.0, None
        lora = repeat.lora if repeat is not None else None
        out_BTC, value_BTGD = self.attn(self._norm(x_BTC), context, lora)
        out_BTC = self._thinned(self._attn_dropout, out_BTC, context)
        return self._scaled(self.attn_scale, out_BTC), value_BTGD

    def _transformed(self, x_BTC: Tensor, context: Context, repeat: Repeat | None) -> Tensor:
        """What the MLP adds."""
        if repeat is None and context.adapters is None:
            out_BTC = self.mlp.after(self._norm, x_BTC)
        else:
            h_BTC = self._norm(x_BTC)
            out_BTC = self.mlp(h_BTC) if repeat is None else repeat.transform(self.mlp, h_BTC)
            if context.adapters is not None:
                out_BTC = context.adapters.add("mlp", h_BTC, out_BTC)
        out_BTC = self._thinned(self._mlp_dropout, out_BTC, context)
        return self._scaled(self.mlp_scale, out_BTC)

    def _thinned(self, share: float, out_BTC: Tensor, context: Context) -> Tensor:
        return F.dropout(out_BTC, share) if share and context.is_noisy else out_BTC

    def _scaled(self, scale_C: Tensor | None, out_BTC: Tensor) -> Tensor:
        dtype = out_BTC.dtype
        if scale_C is None:
            return out_BTC
        if self.layer_scale is None:
            return scale_C.to(dtype) * out_BTC
        return self.layer_scale.to(dtype) * scale_C.to(dtype) * out_BTC

    def _kept(self, x_BTC: Tensor, addition: int) -> Tensor:
        if self.resid_lambdas is None:
            return x_BTC
        return self.resid_lambdas[addition].to(x_BTC.dtype) * x_BTC


def _attention_of(config: ModelConfig, layer: int) -> type[SelfAttention]:
    if config.diff_attention != "off":
        return DifferentialAttention
    kind = config.iha_of(layer)
    if kind == "off":
        return SelfAttention
    return FusedHeads if kind == "fused" else InterleavedHeads


def block_scales(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """attn_scale and mlp_scale [C], resid_mix [2, C], as a block begins with them."""
    one, zero = torch.ones(config.model_dim), torch.zeros(config.model_dim)
    start = 1.0 if config.layer_scale else config.layer_scale_init
    return (
        nn.Parameter(start * one),
        nn.Parameter(start * one),
        nn.Parameter(torch.stack((one, zero))),
    )
