"""What joins the token embedding or the values beside it: hashed bigrams, SmearGate, value tables.

A token that begins a document (BOS) has no previous token where `mask_documents` is on; packed rows
would otherwise carry the end of one document into the start of the next.

Legend: B rows, T tokens, C model width, K width of all values, W width of a table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.model.linear import Linear


class BigramHash(nn.Module):
    """A table looked up by a hash of each token and the one before it (parameter-golf #162).

    Bucket (36313 x_t XOR 27191 x_(t-1)) mod (N - 1); a token without a predecessor has the last
    bucket, N - 1. The table begins at zero, so that the model begins as one without it; the
    projection must not, or no gradient would ever reach either.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._buckets = config.bigram_buckets
        self._bos_id = config.bos_id if config.mask_documents else None
        self.table = nn.Embedding(config.bigram_buckets, config.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = (
            nn.Identity()
            if config.bigram_dim == config.model_dim
            else Linear(config.bigram_dim, config.model_dim, init=config.matrix_init)
        )
        self.scale = nn.Parameter(torch.full((1,), 0.05))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, C] in `dtype`, to be added to the embedding before its norm."""
        rows_BTW = self.table(self._bucket(tokens_BT)).to(dtype)
        out_BTC: Tensor = self.proj(rows_BTW) * self.scale.to(dtype)
        return out_BTC

    def _bucket(self, tokens_BT: Tensor) -> Tensor:
        before_BT = F.pad(tokens_BT[:, :-1], (1, 0))
        hashed_BT = ((36313 * tokens_BT) ^ (27191 * before_BT)) % (self._buckets - 1)
        return torch.where(has_previous(tokens_BT, self._bos_id), hashed_BT, self._buckets - 1)


class ChannelSmear(nn.Module):
    """x_t <- (1 - g) x_t + g x_(t-1), g = sigmoid(gate) per channel, after the embedding's norm;
    the form of #1212 and the March records. Begins at g = 1/2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._bos_id = config.bos_id if config.mask_documents else None
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x_BTC: Tensor, tokens_BT: Tensor) -> Tensor:
        gate_C = torch.sigmoid(self.gate).to(x_BTC.dtype)
        before_BTC = previous(x_BTC, has_previous(tokens_BT, self._bos_id))
        return (1 - gate_C) * x_BTC + gate_C * before_BTC


class TokenSmear(nn.Module):
    """x_t <- x_t + scale sigmoid(gate . x_t[:W]) x_(t-1), on the raw embedding (#1667). Begins as
    the identity, because scale is 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._bos_id = config.bos_id if config.mask_documents else None
        self.gate = nn.Parameter(torch.zeros(config.smear_gate_dim))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTC: Tensor, tokens_BT: Tensor) -> Tensor:
        score_BT1 = (x_BTC[..., : self.gate.numel()] * self.gate).sum(-1, keepdim=True)
        before_BTC = previous(x_BTC, has_previous(tokens_BT, self._bos_id))
        return x_BTC + self.scale * torch.sigmoid(score_BT1) * before_BTC


class ValueTable(nn.Module):
    """One table of value embeddings that all chosen layers share (parameter-golf #374). The
    projection begins at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.value_embed_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        kv_width = config.num_kv_heads * config.head_dim
        self.proj = Linear(config.value_embed_dim, kv_width, init="zeros")
        self.scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, K] in `dtype`; a layer adds it to its values, times its own scale."""
        out_BTK: Tensor = self.proj(self.table(tokens_BT).to(dtype)) * self.scale.to(dtype)
        return out_BTK


def has_previous(tokens_BT: Tensor, bos_id: int | None) -> Tensor:
    """False at the first position of a row and, unless bos_id is None, where a document begins."""
    first_T = torch.arange(tokens_BT.size(1), device=tokens_BT.device) == 0
    begins_BT = first_T.expand_as(tokens_BT)
    return ~begins_BT if bos_id is None else ~(begins_BT | (tokens_BT == bos_id))


def previous(x_BTC: Tensor, has_previous_BT: Tensor) -> Tensor:
    """x_(t-1), zero where there is none."""
    return F.pad(x_BTC[:, :-1], (0, 0, 1, 0)) * has_previous_BT[..., None].to(x_BTC.dtype)
