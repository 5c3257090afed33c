"""Where the documents of a batch lie, in the forms that attention backends want them.

A token sees its own document only, up to itself. A document begins at its BOS or at the start of
the row; a limit on its length cuts it into pieces that do not see each other either. One object is
made per forward pass, outside the layers, and what is derived from it is derived once: boundaries
move from batch to batch as numbers in tensors of fixed shapes, so nothing is compiled anew.

Legend: B rows, T tokens, N = B T, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.attention.document_places import first_visible


class Pieces(NamedTuple):
    """Documents as FlashAttention's "varlen" takes them: packed, with their boundaries."""

    bounds: Tensor
    """[P + 1] int32: where each piece begins, then N as often as there is room."""
    max_len: int
    """No piece is longer."""
    guard: Tensor
    """Scalar: 1, or NaN when there are more pieces than room; queries are multiplied by it, so that
    a run ends with a loss of NaN instead of silently attending across documents."""


class Documents:
    """The documents of one batch of tokens.

    Args:
        tokens_BT: int64.
        bos_id: token that begins a document.
        max_len: documents are cut into pieces of so many tokens; 0 = not cut.
    """

    def __init__(self, tokens_BT: Tensor, bos_id: int, max_len: int = 0) -> None:
        first_BT: Tensor = first_visible(tokens_BT, bos_id, max_len)
        self.first_BT = first_BT
        """For each token, the place in its row of the first token that it may see."""
        self._longest = max_len
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key and kept."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def mask(self, window: int | None) -> Tensor:
        """True where a query may see a key, [B, T, T]."""
        result: Tensor = self.once(("mask", window), lambda: self._mask(window))
        return result

    def _mask(self, window: int | None) -> Tensor:
        place_T = torch.arange(self.first_BT.size(1), device=self.first_BT.device)
        visible_BTT = (place_T >= self.first_BT[..., None]) & (place_T <= place_T[:, None])
        if window is None:
            return visible_BTT
        return visible_BTT & (place_T[:, None] - place_T <= window)

    def pieces(self) -> Pieces:
        """Boundaries of the rows laid end to end."""
        result: Pieces = self.once("pieces", self._pieces)
        return result

    def _pieces(self) -> Pieces:
        num_rows, num_tokens = self.first_BT.shape
        total = num_rows * num_tokens
        place_T = torch.arange(num_tokens, device=self.first_BT.device)
        begins_N = (self.first_BT == place_T).flatten()
        # Here and not before: a comparison of lengths ties a graph to one side of it.
        max_len = min(self._longest or num_tokens, num_tokens)
        room = room_for_pieces(num_rows, num_tokens, max_len)
        number_N = torch.cumsum(begins_N, 0) - 1
        # The last slot takes what is no beginning, or finds no room; it is cut off.
        slot_N = torch.where(begins_N & (number_N < room), number_N, room + 1)
        bounds = torch.full((room + 2,), total, dtype=torch.int32, device=place_T.device)
        place_N = torch.arange(total, dtype=torch.int32, device=place_T.device)
        bounds = bounds.scatter(0, slot_N, place_N)[:-1]
        guard = torch.where(number_N[-1] < room, 1.0, torch.nan)
        return Pieces(bounds, max_len, guard)


def room_for_pieces(num_rows: int, num_tokens: int, max_len: int) -> int:
    """Pieces that the boundaries of a batch have room for: fixed by its shape, because a compiled
    graph is. Documents of 128 tokens on average fill it; small batches have room for any."""
    total = num_rows * num_tokens
    cuts = num_rows * math.ceil(num_tokens / max_len)
    return min(total, max(256, total // 128) + cuts)


def packed(x_BTHD: Tensor) -> Tensor:
    """Rows laid end to end, [N, H, D]."""
    return x_BTHD.flatten(0, 1)
