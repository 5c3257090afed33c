"""Interleaved head attention: heads mix before they attend.

Two forms, after https://arxiv.org/abs/2602.21371 and the repository slowrun:

    fused        W'_h = sum_m M[h, m] W_m for the projections of q, k, v: the same functions as
                 plain attention with another course of training (slowrun #69, #80)
    interleaved  x~[t, h, p] = sum_m A[m, h, p] x[t, m] for x = q, k, v: P pseudo-heads of a head,
                 which stand side by side as pseudo-tokens s = t P + p; after attention among them
                 y[t, h] = sum_p R[h, p] y~[t, h, p]  (slowrun #78, "own")
                 y[t, h] = sum_h' sum_p R[h, h' P + p] y~[t, h', p]  (the paper, "all")

Note the orders of the indices: M is [target, source], A is [source, target, pseudo-head]. Keys and
values mix among their own heads, so that grouped queries are what they were. Fused, values mix
before anything joins them; interleaved, after.

Never clip gradients by a norm, nor use SGD, with iha_init = "first": the norm of a zero vector has
the slope 1 / sqrt(EPS) = 2896, and so have the first gradients of the other pseudo-heads.

Legend: B rows, T tokens, P pseudo-heads, S = T P pseudo-tokens, C model width, H query heads, G key
and value heads, N either of them, D head width, F rotary frequencies.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.attention.pseudo_tokens import build_by_token
from trainer.attention.repeat import repeat_groups
from trainer.config import ModelConfig
from trainer.kernels.iha import interleave
from trainer.model.attention import Context, SelfAttention


class FusedMixes(nn.Module):
    """M of each projection, [target, source], from the identity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.eye(config.num_heads))
        self.k = nn.Parameter(torch.eye(config.num_kv_heads))
        self.v = nn.Parameter(torch.eye(config.num_kv_heads))
        if config.iha_fused == "qkvo":
            self.out = nn.Parameter(torch.eye(config.num_heads))


class FusedHeads(SelfAttention):
    """SelfAttention whose matrices are mixed head by head before they are used."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__(config, attend, layer)
        self.iha = FusedMixes(config)
        self._mixes_out = config.iha_fused == "qkvo"

    def _qkv_weight(self, dtype: torch.dtype) -> Tensor:
        pairs = ((self.iha.q, self.q), (self.iha.k, self.k), (self.iha.v, self.v))
        return torch.cat([mixed_rows(mix, of.weight, dtype) for mix, of in pairs])

    def _leave(self, heads_BTC: Tensor) -> Tensor:
        if not self._mixes_out:
            return super()._leave(heads_BTC)
        # What the output matrix multiplies stands in columns: W'[:, h] = sum_m M[h, m] W[:, m].
        weight = mixed_rows(self.iha.out, self.out.weight.T, heads_BTC.dtype)
        return F.linear(heads_BTC, weight.T)


def mixed_rows(mix_NN: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W'_h = sum_m M[h, m] W_m over the heads that stack up to W, [N D, C]. Both are cast before,
    so that an identity leaves every bit as it is. A mix of more rows gives more heads."""
    heads = weight.to(dtype).reshape(mix_NN.size(1), -1)
    return (mix_NN.to(dtype) @ heads).view(-1, weight.size(1))


class InterleavedMixes(nn.Module):
    """A of q, k and v, [source, target, P], and R of the collapse, [H, P] or [H, H P]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, count = config.num_heads, config.iha_pseudo_heads
        self.q = nn.Parameter(_first_mix(heads, config))
        self.k = nn.Parameter(_first_mix(config.num_kv_heads, config))
        self.v = nn.Parameter(_first_mix(config.num_kv_heads, config))
        share = torch.full((heads, count), 1 / count)
        if config.iha_collapse == "all":
            share = (torch.eye(heads)[:, :, None] * share).flatten(1)
        self.collapse = nn.Parameter(share)


def _first_mix(heads: int, config: ModelConfig) -> Tensor:
    """[heads, heads, P]: the head itself as pseudo-head 0, or as each of them."""
    mix = torch.zeros(heads, heads, config.iha_pseudo_heads)
    last = 1 if config.iha_init == "first" else config.iha_pseudo_heads
    mix[:, :, :last] = torch.eye(heads)[:, :, None]
    return mix


class InterleavedHeads(SelfAttention):
    """SelfAttention among pseudo-tokens; see the module's description.

    `kernel` is set by the builder: "compiled" is the code below; "fused" mixes, turns and
    normalises in one operator (trainer/kernels/iha.py), in training only.
    """

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__(config, attend, layer)
        self.iha = InterleavedMixes(config)
        self._count = config.iha_pseudo_heads
        self._attend = _attend_of_layer(config, attend, layer)
        self._tables = _own_tables if config.positions_per_token > 1 else self._token_tables
        self._folds = config.iha_product == "weights"
        self._mix = _as_it_is if self._folds else interleaved
        self._collapse = self._own if config.iha_collapse == "own" else self._all
        self.kernel = "compiled"

    def _project(
        self, x_BTC: Tensor, context: Context, lora: nn.ModuleDict | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._folds:
            return super()._project(x_BTC, context, lora)
        assert not lora and context.adapters is None  # the settings forbid both
        pairs = ((self.iha.q, self.q), (self.iha.k, self.k))
        weights = [mixed_rows(_rows_of(mix), of.weight, x_BTC.dtype) for mix, of in pairs]
        weight = torch.cat([*weights, self.v.weight.to(x_BTC.dtype)])
        widths = [self._count * width for width in self._widths[:2]] + self._widths[2:]
        q, k, v = torch.split(F.linear(x_BTC, weight), widths, dim=-1)
        num_rows, num_tokens, _ = x_BTC.shape
        q_BSHD, k_BSGD = (
            part.reshape(num_rows, num_tokens * self._count, -1, self._head_dim) for part in (q, k)
        )
        return q_BSHD, k_BSGD, v.reshape(num_rows, num_tokens, -1, self._head_dim)

    def _attended(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        gain_H: Tensor | None,
        context: Context,
    ) -> Tensor:
        dtype = v_BTGD.dtype
        tables = self._tables(context)
        fuses = self.kernel == "fused" and torch.is_grad_enabled()
        enter, mix = (_fused, _fused) if fuses else (self._plain, interleaved)
        q_BSHD = enter(q_BTHD, self.iha.q, tables)
        if gain_H is not None:
            q_BSHD = q_BSHD * gain_H[:, None]
        k_BSGD, v_BSGD = enter(k_BTGD, self.iha.k, tables), mix(v_BTGD, self.iha.v)
        out_BSHD = context.attend(self._attend, q_BSHD.to(dtype), k_BSGD.to(dtype), v_BSGD)
        num_rows, _, *head = out_BSHD.shape
        return self._collapse(out_BSHD.view(num_rows, -1, self._count, *head))

    def _plain(self, x_BTND: Tensor, mix_NNP: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return self._position(self._mix(x_BTND, mix_NNP), *tables)

    def _token_tables(self, context: Context) -> tuple[Tensor, Tensor]:
        """Each token's row of the tables for each of its pseudo-tokens."""
        tables = (context.cos_TF, context.sin_TF)
        cos_SF, sin_SF = (table.repeat_interleave(self._count, 0) for table in tables)
        return cos_SF, sin_SF

    def _own(self, out_BTPHD: Tensor) -> Tensor:
        share_PH1 = self.iha.collapse.T[..., None].to(out_BTPHD.dtype)
        return (out_BTPHD * share_PH1).sum(2)

    def _all(self, out_BTPHD: Tensor) -> Tensor:
        # The columns of R count pseudo-heads fastest; attention leaves heads fastest.
        share_HHP = self.iha.collapse.view(-1, out_BTPHD.size(3), self._count)
        share: Tensor = share_HHP.transpose(1, 2).flatten(1).to(out_BTPHD.dtype)
        return share @ out_BTPHD.flatten(2, 3)


def interleaved(x_BTND: Tensor, mix_NNP: Tensor) -> Tensor:
    """Pseudo-heads of all heads as pseudo-tokens, [B, T P, N, D], p fastest among them. One product
    with the rows of the mix in the order (p, target) writes them where they are to stand."""
    num_rows, num_tokens, *head = x_BTND.shape
    mix = _rows_of(mix_NNP).to(x_BTND.dtype).expand(num_rows * num_tokens, -1, -1)
    return torch.bmm(mix, x_BTND.flatten(0, 1)).view(num_rows, -1, *head)


def _fused(x_BTND: Tensor, mix_NNP: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    return interleave(x_BTND, _rows_of(mix_NNP), tables)


def _as_it_is(x_BSND: Tensor, mix_NNP: Tensor) -> Tensor:
    """What stands in for `interleaved` where the weights are mixed."""
    return x_BSND


def _rows_of(mix_NNP: Tensor) -> Tensor:
    """A as a matrix, a row for each (p, target), [P N, N]."""
    return mix_NNP.permute(2, 1, 0).flatten(0, 1)


def _own_tables(context: Context) -> tuple[Tensor, Tensor]:
    assert context.cos_SF is not None and context.sin_SF is not None
    return context.cos_SF, context.sin_SF


def _attend_of_layer(config: ModelConfig, attend: Attend, layer: int) -> Attend:
    """The backend with this layer's mask and window among pseudo-tokens fixed."""
    if config.iha_mask == "block":
        attend = build_by_token(config.iha_pseudo_heads)
    elif config.gqa == "repeat":
        attend = partial(repeat_groups, attend)
    window = config.pseudo_window_of(layer)
    return attend if window is None else partial(attend, window=window)
