"""The one signature that every attention backend has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.attention.documents import Documents

Log = Callable[[str], None]


class Attend(Protocol):
    """Causal scaled dot-product attention with grouped queries.

    Legend: B rows, T tokens, H query heads, G key and value heads (G divides H; query head h reads
    group h // (H / G)), D head width. Scores are scaled by 1 / sqrt(D).
    """

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        /,
        *,
        window: int | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention output, [B, T, H, D], in the dtype of q.

        Args:
            window: None lets a token see itself and everything before. w lets it see itself and the
                w tokens before it (w + 1 keys), which is FlashAttention's `window_size=(w, 0)`.
            documents: where given, a token sees nothing before its own document either.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """A row of the table of backends."""

    name: str
    build: Callable[[str, Log], Attend]
    """From device type and log; called after `fault` found none."""
    fault: Callable[[str], str | None]
    """Why the backend cannot run on this device type, with the remedy; None when it can."""
