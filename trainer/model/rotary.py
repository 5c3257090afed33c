"""Rotary position embedding in the half-split layout: pairs are (i, i + R/2) of R rotated dims.

Su et al., RoFormer, https://arxiv.org/abs/2104.09864

Legend: T positions, D head width, R rotated dims (the first of the head; the rest carry no
position), F = R / 2 frequencies.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.config.window_stages import stretched
from trainer.errors import ConfigError
from trainer.model.norm import rms_norm


class Rotary(nn.Module):
    """cos and sin for rows of any length up to a limit.

    With `rope_ntk_len` = T0, a row of T > T0 tokens uses base (T / T0)^(R / (R - 2)), so that its
    slowest wave is stretched by T / T0 and its fastest kept. Rows of different lengths then rotate
    differently under the same weights, as parameter-golf #1212 trains them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, max_seq_len: int, row_lengths: Iterable[int]) -> None:
        super().__init__()
        self._base = config.rope_base
        self._rotated = config.rotated_dims
        self._is_half = config.half_rope
        self._ntk_len = config.rope_ntk_len
        self._max_seq_len = max_seq_len
        self._per_token = config.positions_per_token
        self._keep("", *self._tables(max_seq_len * self._per_token, self._base))
        self._num_stages = len(config.stages)
        for stage in range(self._num_stages):
            frequencies = stretched(self._frequencies(), config.stages[: stage + 1])
            self._keep(f"_stage_{stage}", *tables_of(max_seq_len, frequencies))
        for length in {length for length in row_lengths if self._is_stretched(length)}:
            self._keep(f"_{length}", *self._tables(length, self._base_of(length)))

    def forward(self, num_tokens: int, stage: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T, F], in a stage of model.window_stages. ConfigError when T is above
        the limit."""
        if num_tokens > self._max_seq_len:
            raise ConfigError(
                f"rows of {num_tokens} tokens, but the model was built for at most "
                f"{self._max_seq_len}; lower data.seq_len or evaluate.seq_len, or build "
                "GPT(..., max_seq_len=)"
            )
        if self._num_stages:
            tables = (getattr(self, f"{name}_stage_{stage}") for name in ("cos", "sin"))
            cos_TF, sin_TF = (table[:num_tokens] for table in tables)
            return cos_TF, sin_TF
        if not self._is_stretched(num_tokens):
            return self.cos[:num_tokens], self.sin[:num_tokens]
        if hasattr(self, f"cos_{num_tokens}"):
            return getattr(self, f"cos_{num_tokens}"), getattr(self, f"sin_{num_tokens}")
        return self._tables(num_tokens, self._base_of(num_tokens), self.cos.device)

    def of_pseudo_tokens(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the pseudo-tokens of a row that is not too long, fp32 [T P, F]."""
        num_positions = num_tokens * self._per_token
        return self.cos[:num_positions], self.sin[:num_positions]

    def _frequencies(self) -> list[float]:
        """Radians per token of each pair, fastest first."""
        return [self._base ** (-2 * pair / self._rotated) for pair in range(self._rotated // 2)]

    def _is_stretched(self, num_tokens: int) -> bool:
        return 0 < self._ntk_len < num_tokens

    def _base_of(self, num_tokens: int) -> float:
        stretch: float = num_tokens / self._ntk_len
        return float(self._base * stretch ** (self._rotated / (self._rotated - 2)))

    def _tables(
        self, num_positions: int, base: float, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._is_half:
            return rotary_tables(num_positions, self._rotated, base, device)
        cos_TF, sin_TF = rotary_tables(num_positions, self._rotated // 2, base, device)
        return torch.cat((cos_TF, cos_TF * 0 + 1), 1), torch.cat((sin_TF, sin_TF * 0), 1)

    def _keep(self, suffix: str, cos_TF: Tensor, sin_TF: Tensor) -> None:
        self.register_buffer(f"cos{suffix}", cos_TF, persistent=False)
        self.register_buffer(f"sin{suffix}", sin_TF, persistent=False)


def rotary_tables(
    num_positions: int, num_dims: int, base: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each fp32 [num_positions, num_dims / 2].

    Angles are formed in fp64: at position 8000 an fp32 product is off by 5e-4 radians.
    """
    exponent = torch.arange(0, num_dims, 2, dtype=torch.float64, device=device) / num_dims
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    angle = torch.outer(positions, base**-exponent)
    return angle.cos().float(), angle.sin().float()


def tables_of(num_positions: int, frequencies: list[float]) -> tuple[Tensor, Tensor]:
    """The same of frequencies that follow no base."""
    positions = torch.arange(num_positions, dtype=torch.float64)
    angle = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float64))
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + R/2]), i < R/2, by the angle of its position."""
    num_dims = 2 * cos_TF.size(-1)
    first, second = x_BTHD[..., :num_dims].chunk(2, dim=-1)
    cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
    turned = (first * cos + second * sin, second * cos - first * sin)
    if num_dims == x_BTHD.size(-1):
        return torch.cat(turned, dim=-1)
    return torch.cat((*turned, x_BTHD[..., num_dims:].to(turned[0].dtype)), dim=-1)


def normed_then_turned(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Queries or keys as attention compares them."""
    return rotate(rms_norm(x_BTHD), cos_TF, sin_TF)


def turned_then_normed(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """The same in the other order (nanochat, slowrun)."""
    return rms_norm(rotate(x_BTHD, cos_TF, sin_TF))
