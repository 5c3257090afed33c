"""Attention through FlexAttention: skips the blocks outside a window, so windows save time.

Compiled on cuda. The library has no backward pass on cpu; there the same visibility rule masks a
dense softmax: correct, slow, good for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.document_places import BLOCK, document_blocks
from trainer.attention.documents import Documents

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_flex(device_type: str, log: Log) -> Attend:
    """The backend for this device: compiled on cuda, a dense softmax on cpu."""
    if device_type == "cuda":
        return partial(attend_flex, torch.compile(flex_attention, dynamic=False))
    log("attention: flex is a dense softmax on cpu; sdpa is faster there")
    return attend_dense


def attend_flex(
    flex: Callable[..., Any],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`; `flex` is the library's function, compiled or not."""
    out_BHTD: Tensor = flex(
        q_BTHD.transpose(1, 2),
        k_BTGD.transpose(1, 2),
        v_BTGD.transpose(1, 2),
        block_mask=block_mask_of(q_BTHD.size(1), window, q_BTHD.device, documents),
        enable_gqa=q_BTHD.size(2) != k_BTGD.size(2),
    )
    return out_BHTD.transpose(1, 2)


def attend_dense(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`; materialises all scores, [B, G, H/G, T, T]."""
    num_rows, num_tokens, num_groups, width = k_BTGD.shape
    mask_BTT = (
        create_mask(_visible(window), None, None, num_tokens, num_tokens, device=q_BTHD.device)[0]
        if documents is None
        else documents.mask(window)
    )
    q_BTGRD = q_BTHD.reshape(num_rows, num_tokens, num_groups, -1, width)
    scores_BGRTS = torch.einsum("btgrd,bsgd->bgrts", q_BTGRD, k_BTGD) * width**-0.5
    weights_BGRTS = scores_BGRTS.masked_fill(~mask_BTT[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bgrts,bsgd->btgrd", weights_BGRTS, v_BTGD).flatten(2, 3)


def _visible(window: int | None) -> Visible:
    """The rule of `Attend` in FlexAttention's form: may this query see this key?"""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        return causal if window is None else causal & (query - key <= window)

    return visible


def _visible_in(documents: Documents, window: int | None) -> Visible:
    """The same within documents."""
    in_window, first_BT = _visible(window), documents.first_BT

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_window(batch, head, query, key) & (key >= first_BT[batch, query])

    return visible


def block_mask_of(
    num_tokens: int, window: int | None, device: torch.device, documents: Documents | None
) -> BlockMask:
    """Which blocks are seen, made once per batch of documents, and once for all without."""
    if documents is not None:
        mask: BlockMask = documents.once(
            ("flex", window), lambda: document_block_mask(documents, window)
        )
        return mask
    # Inside a compiled model a cache would be looked up while tracing: hits and misses give
    # different graphs. There the mask is built in the graph, once for all layers of one window,
    # because equal subexpressions are merged.
    build = _build_mask if torch.compiler.is_compiling() else _cached_mask
    return build(num_tokens, window, device)


def _build_mask(num_tokens: int, window: int | None, device: torch.device) -> BlockMask:
    return create_block_mask(_visible(window), None, None, num_tokens, num_tokens, device=device)


_cached_mask = lru_cache(maxsize=64)(_build_mask)


def document_block_mask(documents: Documents, window: int | None) -> BlockMask:
    """The block mask of one batch's documents, from the blocks' borders alone."""
    num_tokens = documents.first_BT.size(1)
    blocks = document_blocks(documents.first_BT, window)
    return BlockMask(
        seq_lengths=(num_tokens, num_tokens),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_visible_in(documents, window),
        **dict(zip(_BLOCKS, blocks, strict=True)),
    )


_BLOCKS = tuple(
    f"{kind}_{what}"
    for kind in ("kv", "full_kv", "q", "full_q")
    for what in ("num_blocks", "indices")
)
"""The library's names of the tensors below, in their order."""


def _fault(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {device_type}; set runtime.attention = sdpa"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "it needs Triton on cuda; install triton or set runtime.attention = sdpa"
    return None


FLEX = Backend("flex", build_flex, _fault)
