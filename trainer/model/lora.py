"""Low-rank adapters: what a visit of a block adds to the products with its matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig

OF_ATTENTION = ("q", "k", "v", "out")
OF_MLP = ("up", "down")
"""The matrices of a block."""


class Lora(nn.Module):
    """(x A) B. A begins normal over sqrt(in), B normal times `second_std` over sqrt(rank)."""

    def __init__(self, num_in: int, num_out: int, rank: int, second_std: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(num_in, rank) / math.sqrt(num_in))
        self.b = nn.Parameter(torch.zeros(rank, num_out))
        if second_std:
            nn.init.normal_(self.b, std=second_std / math.sqrt(rank))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a.to(x.dtype)) @ self.b.to(x.dtype)


def build_lora(
    config: ModelConfig,
    rank: int,
    names: Sequence[str] = OF_ATTENTION + OF_MLP,
    second_std: float = 0.0,
) -> nn.ModuleDict:
    """Adapters of the named matrices of a block; none for rank 0."""
    width, kv_width = config.model_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q": (width, width),
        "k": (width, kv_width),
        "v": (width, kv_width),
        "out": (width, width),
        "up": (width, config.mlp_dim),
        "down": (config.mlp_dim, width),
    }
    return nn.ModuleDict(
        {name: Lora(*shapes[name], rank, second_std) for name in names} if rank else {}
    )


def adapt(lora: nn.ModuleDict, name: str, x: Tensor, product: Tensor) -> Tensor:
    """The product of x with the named matrix, plus its adapter where there is one."""
    return product + lora[name](x) if name in lora else product
