"""Low-rank adapters that enter a forward pass from outside, one pair of factors per row.

Test-time training adapts to every document of a batch on its own, so row b computes
x W^T + scale (x A_b^T) B_b^T with factors of its own. Adapters are arguments of the forward pass,
not parameters of the model: without them the model is what it was, to the bit and by name. There is
one set per visit of a block, so a block that is visited several times has several.

The adapters "out" and "mlp" stand beside the attention and the MLP: they read the same normalised
input and add to the output (parameter-golf #1530).

Legend: S visits, B rows, T tokens, C model width, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import ModelConfig

Factors = tuple[Tensor, Tensor]
"""A [B, R, in] and B [B, out, R], fp32."""


class Adapters(NamedTuple):
    """What a forward pass takes beside tokens. Build it anew when tensors are replaced."""

    stacked: dict[str, Factors]
    """Names out of q, k, v, out, mlp, with one more axis [S] in front; "head" without."""
    scale: float = 1.0
    softcaps: Tensor | None = None
    """[2], for positive and negative logits, in the place of the model's one."""

    def by_visit(self) -> tuple[VisitAdapters, ...]:
        """One entry per visit; none where only the head or the softcaps are adapted."""
        # Taken apart in one go: the backward pass of S slices would add S full-sized gradients.
        parts = {
            name: tuple(zip(a.unbind(0), b.unbind(0), strict=True))
            for name, (a, b) in self.stacked.items()
            if name != "head"
        }
        if not parts:
            return ()
        num_visits = len(next(iter(parts.values())))
        return tuple(
            VisitAdapters({name: pairs[visit] for name, pairs in parts.items()}, self.scale)
            for visit in range(num_visits)
        )

    def logits(self, hidden_BTC: Tensor, raw_BTV: Tensor, cap: float) -> Tensor:
        """The raw logits with the head's adapter, squashed, fp32."""
        if "head" in self.stacked:
            raw_BTV = raw_BTV + self.scale * _low_rank(hidden_BTC, self.stacked["head"])
        raw_BTV = raw_BTV.to(torch.promote_types(raw_BTV.dtype, torch.float32))
        if self.softcaps is None:
            return cap * torch.tanh(raw_BTV / cap)
        cap_BTV = torch.where(raw_BTV > 0, self.softcaps[0], self.softcaps[1])
        return cap_BTV * torch.tanh(raw_BTV / cap_BTV)


class VisitAdapters(NamedTuple):
    """The adapters of one visit of a block."""

    factors: dict[str, Factors]
    scale: float

    def add(self, name: str, x_BTC: Tensor, product: Tensor) -> Tensor:
        """A product of x, plus the adapter of that name; the product where there is none."""
        if name not in self.factors:
            return product
        return product + self.scale * _low_rank(x_BTC, self.factors[name])


def _low_rank(x_BTC: Tensor, factors: Factors) -> Tensor:
    a, b = (factor.to(x_BTC.dtype) for factor in factors)
    return torch.bmm(torch.bmm(x_BTC, a.transpose(1, 2)), b.transpose(1, 2))


def num_visits(config: ModelConfig) -> int:
    """Sets of adapters that a forward pass takes."""
    return len(config.visit_order(config.recur_visits))


def adapter_widths(config: ModelConfig, name: str) -> tuple[int, int]:
    """Inputs and outputs of an adapter."""
    kv_width = config.num_kv_heads * config.head_dim
    outputs = {"k": kv_width, "v": kv_width, "head": config.vocab_size}
    return config.model_dim, outputs.get(name, config.model_dim)
