"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.kernels.mlp import fused_mlp
from trainer.model.linear import Linear
from trainer.model.norm import scale_of


class MLP(nn.Module):
    """down(a(up(x))), a a squared ReLU or leaky ReLU; or SwiGLU, down(silu(swish(x)) * up(x))
    (Shazeer, https://arxiv.org/abs/2002.05202).

    `kernel` is set by the builder: "compiled" is the code below; the names of
    `runtime.mlp_kernel` are one operator (trainer/kernels/mlp.py). In training only: scores and
    calibration always come from the code below.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_dim, init=config.matrix_init)
        self.down = Linear(config.mlp_dim, config.model_dim, init="zeros")
        self.activate = build_activation(config.leaky_slope)
        self.kernel = "compiled"
        self._slope = config.leaky_slope
        self.swish: Linear | None = None
        """The third matrix of SwiGLU, set by the model when all else has its initial weights."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self._is_fused():
            return self._fused(x_BTC, norm_scale=0.0)
        if self.swish is None:
            hidden = self.activate(self.up(x_BTC))
        else:
            # One product of two matrices side by side, as for q, k and v.
            weight = torch.cat((self.swish.weight, self.up.weight)).to(x_BTC.dtype)
            gate, value = F.linear(x_BTC, weight).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        out_BTC: Tensor = self.down(hidden)
        return out_BTC

    def after(self, norm: Callable[[Tensor], Tensor], x_BTC: Tensor) -> Tensor:
        """self(norm(x)); a kernel that normalises does so on its way."""
        if self._is_fused() and "norm" in self.kernel:
            return self._fused(x_BTC, norm_scale=scale_of(norm))
        out_BTC: Tensor = self(norm(x_BTC))
        return out_BTC

    def _is_fused(self) -> bool:
        return self.kernel != "compiled" and self.swish is None and torch.is_grad_enabled()

    def _fused(self, x_BTC: Tensor, norm_scale: float) -> Tensor:
        up, down = (matrix.weight.to(x_BTC.dtype) for matrix in (self.up, self.down))
        return fused_mlp(x_BTC, up, down, self._slope, "saved" in self.kernel, norm_scale)


def build_activation(leaky_slope: float) -> Callable[[Tensor], Tensor]:
    """relu(x)^2 (So et al., Primer, https://arxiv.org/abs/2109.08668) for slope 0, else
    leaky_relu(x)^2 (parameter-golf #493), which is positive on both sides and lets gradients of
    negative inputs through."""
    return partial(_leaky_relu_squared, leaky_slope) if leaky_slope else _relu_squared


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _leaky_relu_squared(slope: float, x: Tensor) -> Tensor:
    return F.leaky_relu(x, slope).square()
