"""What a repeat visit of a recurring block has of its own, and how it joins what came before.

Blocks recur_first..recur_last are visited recur_visits times in a row (parameter-golf #1394, #1493;
the order is trainer/config/recurrence.py). Weights, scales, gains and norms are shared, so their
gradients are sums over visits; a repeat may have

    a blend      x + alpha (y - x), RecurAlpha, or a y + b z, RECUR_AB (#1894), for the input x and
                 the output y of the visit and the output z of the visit before, after its own
                 blend; gradients flow into all of them
    adapters     y = W x + B A x for each matrix W of the block, B = 0 at first (RECUR_LORA, #1894)
    an MLP       in place of the shared one (#1204)

Each repeat's parameters are tensors of their own: before it is switched on they have no gradient,
and the optimiser leaves what has no gradient alone, weight decay and Adam's step count included.
Published scripts gave them zero gradients, so that decay wore them down before their first use.

Legend: B rows, T tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.model.lora import OF_ATTENTION, OF_MLP, adapt, build_lora
from trainer.model.mlp import MLP


class Repeat(nn.Module):
    """One repeat visit of one block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._kind = config.recur_blend
        start = {
            "off": [],
            "alpha": [config.recur_alpha_init],
            "ab": [config.recur_a_init, config.recur_b_init],
        }[config.recur_blend]
        self.blend_factors = nn.Parameter(torch.tensor(start)) if start else None
        self.mlp = MLP(config) if config.unties_mlp(layer) else None
        shared: tuple[str, ...] = OF_ATTENTION if config.attends(layer) else ()
        shared += OF_MLP if self.mlp is None else ()
        self.lora = build_lora(config, config.recur_lora_rank, shared)

    def transform(self, shared: MLP, h_BTC: Tensor) -> Tensor:
        """What the block's MLP makes of its normalised input in this visit."""
        out_BTC: Tensor
        if self.mlp is not None:
            out_BTC = self.mlp(h_BTC)
            return out_BTC
        if not self.lora:
            out_BTC = shared(h_BTC)
            return out_BTC
        hidden = shared.activate(adapt(self.lora, "up", h_BTC, shared.up(h_BTC)))
        return adapt(self.lora, "down", hidden, shared.down(hidden))

    def blend(self, x_BTC: Tensor, y_BTC: Tensor, before_BTC: Tensor) -> Tensor:
        """The stream after this visit.

        Args:
            x_BTC: what entered the block.
            y_BTC: what the block made of it.
            before_BTC: the stream after the visit of this block before.
        """
        if self.blend_factors is None:
            return y_BTC
        factors = self.blend_factors.to(y_BTC.dtype)
        if self._kind == "alpha":
            return x_BTC + factors[0] * (y_BTC - x_BTC)
        return factors[0] * y_BTC + factors[1] * before_BTC


def build_repeats(config: ModelConfig, layer: int) -> nn.ModuleList:
    """The repeats of a block, in the order of visits; none where it does not recur."""
    num_repeats = config.recur_visits - 1 if config.recurs(layer) else 0
    return nn.ModuleList(Repeat(config, layer) for _ in range(num_repeats))
