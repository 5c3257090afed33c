"""Causal self-attention of a block: grouped queries, normalised q and k, rotary, gain on q.

What differs between layers (window, values that join, XSA) is fixed when a layer is built.

Legend: B rows, T tokens, C model width, H query heads, G key/value heads, D head width, K = G D,
F rotary frequencies.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend, Documents
from trainer.attention.repeat import repeat_groups
from trainer.config import ModelConfig
from trainer.model.adapters import VisitAdapters
from trainer.model.gate import HeadGate
from trainer.model.linear import Linear
from trainer.model.lora import adapt
from trainer.model.rotary import normed_then_turned, turned_then_normed
from trainer.model.values import (
    LearnedExclusion,
    ValueEmbedScale,
    ValueProjection,
    build_value_residual,
    exclude_own_value,
    keep_output,
)


class Context(NamedTuple):
    """What every block reads beside the residual stream."""

    x0_BTC: Tensor
    """The normalised embedding."""
    cos_TF: Tensor
    sin_TF: Tensor
    value_embed_BTK: Tensor | None = None
    """Where value embeddings are on."""
    first_value_BTGD: Tensor | None = None
    """Layer 0's values as projected; None while layer 0 runs."""
    documents: Documents | None = None
    """Where attention stays within documents."""

    is_noisy: bool = False
    """Whether this pass trains, so that dropout and stochastic depth draw."""
    all_adapters: tuple[VisitAdapters, ...] = ()
    """Of every visit of a block, where a forward pass was given any."""
    adapters: VisitAdapters | None = None
    """Of the present visit."""
    cos_SF: Tensor | None = None
    """Of every pseudo-token of a row, where they have positions of their own."""
    sin_SF: Tensor | None = None
    stage: int = 0
    """Of model.window_stages."""
    score_scale: float = 1.0
    """Factor on attention's scores, of YaRN."""

    def attend(self, backend: Attend, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        """Attention by `backend`, within documents where that is on."""
        if self.documents is None:
            return backend(q_BTHD, k_BTGD, v_BTGD)
        return backend(q_BTHD, k_BTGD, v_BTGD, documents=self.documents)

    def at_visit(self, visit: int) -> Context:
        """The context as the visit-th block to run reads it."""
        if not self.all_adapters:
            return self
        return self._replace(adapters=self.all_adapters[visit])


class SelfAttention(nn.Module):
    """See the module's description."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__()
        self._attend = attend_of_layer(config, attend, layer)
        self._stage_windows = config.stage_windows(layer)
        self._attend_anywhere = with_groups(config, attend)
        self._head_dim = config.head_dim
        self._widths = [config.model_dim] + 2 * [config.num_kv_heads * config.head_dim]
        self.q, self.k, self.v = (
            Linear(config.model_dim, width, init=config.matrix_init) for width in self._widths
        )
        self.out = Linear(config.model_dim, config.model_dim, init="zeros")
        self._offsets_keys = config.offsets_keys(layer)
        self.q_gain: nn.Parameter | None = None
        if config.qk_gain == "learned":
            self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.value_residual = build_value_residual(config, layer)
        self.value_embed = ValueEmbedScale() if config.embeds_values(layer) else None
        self._exclude = exclude_own_value if config.excludes(layer) else keep_output
        self.xsa: LearnedExclusion | None = None
        if config.excludes(layer) and config.xsa_strength == "learned":
            self.xsa, self._exclude = LearnedExclusion(config), keep_output
        self.value_proj: ValueProjection | None = None
        """Set by the model when all else has its initial weights."""
        self._position = (
            normed_then_turned if config.qk_norm == "before_rope" else turned_then_normed
        )
        self.gate: HeadGate | None = None
        """Set by the model when all else has its initial weights."""

    def forward(
        self, x_BTC: Tensor, context: Context, lora: nn.ModuleDict | None = None
    ) -> tuple[Tensor, Tensor]:
        """What attention adds, [B, T, C], and the values as projected, [B, T, G, D].

        Args:
            lora: adapters of this visit of the block (trainer/model/recurrence.py).
        """
        q_BTHD, k_BTGD, projected_BTGD = self._project(x_BTC, context, lora)
        v_BTGD = self._join_values(projected_BTGD, context)
        if self.value_proj is not None:
            v_BTGD = self.value_proj(v_BTGD, context.x0_BTC, x_BTC)
        out_BTHD = self._attended(q_BTHD, k_BTGD, v_BTGD, self.q_gain, context)
        out_BTHD = self._exclude(out_BTHD, v_BTGD)
        if self.xsa is not None:
            out_BTHD = self.xsa(out_BTHD, v_BTGD)
        if self.gate is not None:
            out_BTHD = self.gate(out_BTHD, x_BTC)
        heads_BTC = out_BTHD.flatten(2)
        out_BTC = self._leave(heads_BTC)
        if lora:
            out_BTC = adapt(lora, "out", heads_BTC, out_BTC)
        if context.adapters is not None:
            out_BTC = context.adapters.add("out", x_BTC, out_BTC)
        return out_BTC, projected_BTGD

    def _project(
        self, x_BTC: Tensor, context: Context, lora: nn.ModuleDict | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # One product of three matrices side by side: the weights stay separate parameters, but the
        # activations are read once, and once more in the backward pass (1 ms of 249 on an H200).
        weight = self._qkv_weight(x_BTC.dtype)
        qkv = F.linear(x_BTC, weight)
        if lora:
            qkv = qkv + torch.cat([lora[name](x_BTC) for name in "qkv"], dim=-1)
        if context.adapters is not None:
            parts = zip("qkv", torch.split(qkv, self._widths, dim=-1), strict=True)
            qkv = torch.cat([context.adapters.add(name, x_BTC, part) for name, part in parts], -1)
        return self._heads(qkv)

    def _qkv_weight(self, dtype: torch.dtype) -> Tensor:
        """The three matrices side by side, [H D + 2 K, C]."""
        return torch.cat((self.q.weight, self.k.weight, self.v.weight)).to(dtype)

    def _leave(self, heads_BTC: Tensor) -> Tensor:
        """The output projection."""
        out_BTC: Tensor = self.out(heads_BTC)
        return out_BTC

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTGD, v_BTGD = (
            part.reshape(*part.shape[:2], -1, self._head_dim)
            for part in torch.split(qkv, self._widths, dim=-1)
        )
        return q_BTHD, k_BTGD, v_BTGD

    def _join_values(self, v_BTGD: Tensor, context: Context) -> Tensor:
        if self.value_residual is not None:
            v_BTGD = self.value_residual(v_BTGD, context.first_value_BTGD)
        if self.value_embed is not None:
            v_BTGD = self.value_embed(v_BTGD, context.value_embed_BTK)
        return v_BTGD

    def _attended(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        gain_H: Tensor | None,
        context: Context,
    ) -> Tensor:
        dtype = v_BTGD.dtype
        cos_TF, sin_TF = context.cos_TF, context.sin_TF
        # The tables and the gain are fp32, so this chain is, too; it rounds once at its end.
        q_BTHD = self._position(q_BTHD, cos_TF, sin_TF)
        if gain_H is not None:
            q_BTHD = q_BTHD * gain_H[:, None]
        k_BTGD = self._position(k_BTGD, cos_TF, sin_TF)
        if self._offsets_keys:
            k_BTGD = offset_keys(k_BTGD)
        if context.score_scale != 1.0:
            q_BTHD = q_BTHD * context.score_scale
        attend = self._backend(context.stage, q_BTHD.size(1))
        return context.attend(attend, q_BTHD.to(dtype), k_BTGD.to(dtype), v_BTGD)

    def _backend(self, stage: int, num_tokens: int) -> Attend:
        if not self._stage_windows:
            return self._attend
        window = self._stage_windows[stage]
        if window + 1 >= num_tokens:  # which backends do faster when no window is asked for
            return self._attend_anywhere
        return partial(self._attend_anywhere, window=window)


def offset_keys(k_BTGD: Tensor) -> Tensor:
    """Keys whose second half is that of the token before; the first token keeps its own. A query
    finds what follows a match in one layer (modded-nanogpt; slowrun, its tiny track)."""
    own, other = k_BTGD.chunk(2, dim=-1)
    return torch.cat((own, torch.cat((other[:, :1], other[:, :-1]), dim=1)), dim=-1)


def attend_of_layer(config: ModelConfig, attend: Attend, layer: int) -> Attend:
    """The backend with this layer's window and way of grouping fixed."""
    attend = with_groups(config, attend)
    window = config.window_of(layer)
    return attend if window is None else partial(attend, window=window)


def with_groups(config: ModelConfig, attend: Attend) -> Attend:
    """The backend with the way of grouping fixed."""
    return partial(repeat_groups, attend) if config.gqa == "repeat" else attend
