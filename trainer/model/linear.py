"""A bias-free matrix whose fp32 master weight is cast to the input's dtype at use."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T with W of shape (out, in), kept in fp32 and cast where it is used.

    The optimiser therefore always updates full-precision numbers, whatever the matrix products run
    in, without autocast.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        init: Literal["uniform", "orthogonal", "unit", "zeros"] = "uniform",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_out, num_in))
        if init == "uniform":
            # kaiming_uniform_(a=sqrt(5)), PyTorch's default for linear layers, written out
            nn.init.uniform_(self.weight, -1 / math.sqrt(num_in), 1 / math.sqrt(num_in))
        elif init == "unit":
            nn.init.uniform_(self.weight, -math.sqrt(3 / num_in), math.sqrt(3 / num_in))
        elif init == "orthogonal":
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))
