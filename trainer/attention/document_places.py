"""Which tokens and blocks a document can see, as operators that no compiled graph looks into.

FlexAttention's kernel reads these tensors. Computed by the compiled graph itself, one of them was
refused and others came out wrong (PyTorch 2.11). Schemas are written out, because a packed program
has no annotations that they could be read from.

Legend: B rows, T tokens, K blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128
"""Queries and keys of a block of FlexAttention, the library's own choice."""


@torch.library.custom_op(
    "caddie::first_visible",
    mutates_args=(),
    schema="(Tensor tokens, SymInt bos_id, SymInt max_len) -> Tensor",
)
def first_visible(tokens_BT: Tensor, bos_id: int, max_len: int) -> Tensor:
    """For each token, the place in its row of the first token that it may see, [B, T] int64.

    An operator of its own, because FlexAttention's kernel reads this tensor, and a compiled graph
    without gradients refuses to hand it one that it computes itself (PyTorch 2.11).
    """
    place_T = torch.arange(tokens_BT.size(1), device=tokens_BT.device)
    first_BT = torch.cummax(torch.where(tokens_BT == bos_id, place_T, 0), dim=1).values
    if max_len:
        first_BT = first_BT + (place_T - first_BT) // max_len * max_len
    return first_BT


@first_visible.register_fake
def _(tokens_BT: Tensor, bos_id: int, max_len: int) -> Tensor:
    return torch.empty_like(tokens_BT)


@torch.library.custom_op(
    "caddie::document_blocks",
    mutates_args=(),
    schema="(Tensor first, SymInt? window) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def document_blocks(
    first_BT: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Blocks of keys by block of queries: how many in part, [B, 1, K], which, [B, 1, K, K], the
    same for those seen in whole; then blocks of queries by block of keys in the same four tensors.

    An operator of its own: made by the compiled graph itself, they came out wrong (PyTorch 2.11).
    """
    in_part, whole = block_borders(first_BT, window, BLOCK)
    by_query = *_ordered(in_part), *_ordered(whole)
    return *by_query, *_ordered(in_part.mT), *_ordered(whole.mT)


@document_blocks.register_fake
def _(first_BT: Tensor, window: int | None) -> tuple[Tensor, ...]:
    count = math.ceil(first_BT.size(1) / BLOCK)
    sizes = ((first_BT.size(0), 1, count), (first_BT.size(0), 1, count, count))
    return tuple(first_BT.new_empty(size, dtype=torch.int32) for size in sizes * 4)


def _ordered(blocks_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, [B, 1, K], and which: those first, [B, 1, K, K]."""
    order = torch.argsort(blocks_BKK.int(), dim=-1, descending=True, stable=True)
    count = blocks_BKK.sum(-1, dtype=torch.int32)
    return count[:, None].contiguous(), order.int()[:, None].contiguous()


def block_borders(first_BT: Tensor, window: int | None, size: int) -> tuple[Tensor, Tensor]:
    """Which blocks of `size` keys the blocks of as many queries see in part, and which in
    whole, each [B, blocks of queries, blocks of keys] bool. A last block that is not full
    counts as seeing in part, as the library has it.

    Pieces lie in order, so this follows from the first and the last query of a block: no
    [T, T] mask is made.
    """
    num_tokens = first_BT.size(1)
    count = math.ceil(num_tokens / size)
    block_K = torch.arange(count, device=first_BT.device)
    last_K = (block_K * size + size - 1).clamp(max=num_tokens - 1)
    lowest_BK = first_BT[:, block_K * size]
    highest_BK = first_BT[:, last_K]
    if window is not None:
        lowest_BK = torch.maximum(lowest_BK, block_K * size - window)
        highest_BK = torch.maximum(highest_BK, last_K - window)
    below_KK = block_K <= block_K[:, None]
    seen_BKK = below_KK & (block_K >= (lowest_BK // size)[..., None])
    whole_BKK = (block_K < block_K[:, None]) & (block_K * size >= highest_BK[..., None])
    whole_BKK &= (block_K * size + size <= num_tokens)[:, None]
    return seen_BKK & ~whole_BKK, whole_BKK
