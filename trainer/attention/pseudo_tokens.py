"""Attention over pseudo-tokens, P of each token side by side, that see each other by token.

A pseudo-token sees all pseudo-tokens of its own token and of those before it: the block-triangular
mask, where the causal one of the backends would hide the later ones of its own token. FlexAttention
on cuda, which skips what is outside a window; a dense mask elsewhere.

Legend: B rows, S = T P pseudo-tokens, H query heads, G key and value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trainer.attention.base import Attend


def build_by_token(per_token: int) -> Attend:
    """Attention as in `Attend`, with windows in tokens, over rows of `per_token` pseudo-tokens
    each."""
    attend: Attend = partial(_attend, torch.compile(flex_attention, dynamic=False), per_token)
    return attend


def _attend(
    flex: Callable[..., Any],
    per_token: int,
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    /,
    *,
    window: int | None = None,
    documents: None = None,
) -> Tensor:
    num, device = q_BSHD.size(1), q_BSHD.device
    q_BHSD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
    grouped = q_BSHD.size(2) != k_BSGD.size(2)

    def visible(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        distance = query // per_token - key // per_token
        return distance >= 0 if window is None else (distance >= 0) & (distance <= window)

    if q_BSHD.is_cuda:
        mask = create_block_mask(visible, None, None, num, num, device=device)
        out_BHSD: Tensor = flex(q_BHSD, k_BGSD, v_BGSD, block_mask=mask, enable_gqa=grouped)
    else:
        place_S = torch.arange(num, device=device)
        mask_SS = visible(None, None, place_S[:, None], place_S)
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, attn_mask=mask_SS, enable_gqa=grouped
        )
    return out_BHSD.transpose(1, 2)
