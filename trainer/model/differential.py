"""Differential attention: the difference of two softmax maps, which cancels what both attend to.

Ye et al., https://arxiv.org/abs/2410.05258, as parameter-golf #675 tried it. Each head's queries
and keys are two halves, normalised and rotated each on its own:

    "full":   y = A_1 v - l A_2 v
    "split":  y = [A_1 v_1, -l A_2 v_2], v = [v_1, v_2]: another operator, which needs no values
              wider than the keys and half the work; #675 ran it first by mistake
    l = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + l_0,
    l_0 = 0.8 - 0.6 exp(-0.3 layer)

Then y, normalised per head, times 1 - l_0. Both maps run as one call of the backend with twice the
heads, so that every backend and window works.

Legend: B rows, T tokens, H query heads, G key/value heads, D head width, E = D / 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.model.attention import Context, SelfAttention
from trainer.model.norm import rms_norm


class DifferentialAttention(SelfAttention):
    """See the module's description; parameters beside those of SelfAttention: four vectors [E]."""

    def __init__(self, config: ModelConfig, attend: Attend, layer: int) -> None:
        super().__init__(config, attend, layer)
        self._start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self._maps = self._full if config.diff_attention == "full" else self._split
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(config.head_dim // 2)) for _ in range(4)
        )

    def _attended(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        gain_H: Tensor | None,
        context: Context,
    ) -> Tensor:
        dtype = v_BTGD.dtype
        assert gain_H is not None
        q_BTHD = self._place(q_BTHD, context) * gain_H.repeat(2)[:, None]
        k_BTGD = self._place(k_BTGD, context)
        out_BTHD = self._maps(q_BTHD.to(dtype), k_BTGD.to(dtype), v_BTGD, context)
        return rms_norm(out_BTHD) * (1 - self._start)

    def _place(self, x_BTHD: Tensor, context: Context) -> Tensor:
        """All first halves, then all second ones, as heads of width E with their positions."""
        halves = torch.cat(x_BTHD.chunk(2, dim=-1), dim=2)
        return self._position(halves, context.cos_TF, context.sin_TF)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return (first - second + self._start).to(dtype)

    def _full(self, q: Tensor, k: Tensor, v_BTGD: Tensor, context: Context) -> Tensor:
        # Backends want keys as wide as values: fill up with zeros, which add nothing to a score,
        # and take back the factor 1 / sqrt(D) in favour of 1 / sqrt(E).
        width = (0, v_BTGD.size(-1) - q.size(-1))
        q, k = F.pad(q * math.sqrt(2), width), F.pad(k, width)
        values = v_BTGD.repeat(1, 1, 2, 1)
        first, second = context.attend(self._attend, q, k, values).chunk(2, dim=2)
        return first - self._weight(v_BTGD.dtype) * second

    def _split(self, q: Tensor, k: Tensor, v_BTGD: Tensor, context: Context) -> Tensor:
        values = torch.cat(v_BTGD.chunk(2, dim=-1), dim=2)
        first, second = context.attend(self._attend, q, k, values).chunk(2, dim=2)
        return torch.cat((first, -self._weight(v_BTGD.dtype) * second), dim=-1)
