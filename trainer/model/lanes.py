"""Two residual streams: attention reads the first, the MLP the second, and both add to both.

With l0 and l1 the lanes, a what attention adds to a stream and m what the MLP adds:

    l0 <- r0 l0 + p00 a + p10 m
    l1 <- r1 l1 + p01 a + p11 m

From block parallel_start on; both lanes begin as the one stream that there was. Skips join the
first lane (#1530, #1855; #1204, where lanes come from, let them join both, and its MLP read what
attention had just added).

Legend: B rows, T tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig


class Lanes(nn.Module):
    """A block's factors on the lanes and on what enters them; the lanes' own begin slightly above
    1, those of what enters at 1."""

    def __init__(self, resid_init: float) -> None:
        super().__init__()
        self.resid = nn.Parameter(torch.full((2,), resid_init))
        self.post = nn.Parameter(torch.ones(2, 2))
        """By what is added (attention, MLP) and by lane."""

    def forward(
        self, first_BTC: Tensor, second_BTC: Tensor, attended: Tensor | float, mixed_BTC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both lanes after the block."""
        resid, post = self.resid.to(mixed_BTC.dtype), self.post.to(mixed_BTC.dtype)
        return (
            resid[0] * first_BTC + post[0, 0] * attended + post[1, 0] * mixed_BTC,
            resid[1] * second_BTC + post[0, 1] * attended + post[1, 1] * mixed_BTC,
        )


class LaneMerge(nn.Module):
    """One stream of two: m l0 + (1 - m) l1, m = 1/2, 1 or 0, or learned from 1/2 (#1477)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._share = {"mean": 0.5, "attention": 1.0, "mlp": 0.0, "learned": 0.5}[kind]
        self.share: nn.Parameter | None = None
        if kind == "learned":
            self.share = nn.Parameter(torch.full((1,), self._share))

    def forward(self, first_BTC: Tensor, second_BTC: Tensor) -> Tensor:
        if self.share is None:
            return self._share * first_BTC + (1 - self._share) * second_BTC
        share = self.share.to(first_BTC.dtype)
        return share * first_BTC + (1 - share) * second_BTC


def build_lanes(config: ModelConfig, layer: int) -> Lanes | None:
    """The factors of a block; None where it has one stream."""
    if config.parallel != "lanes":
        return None
    if config.is_parallel(layer) or config.parallel_factors == "all":
        return Lanes(config.parallel_resid_init)
    return None
