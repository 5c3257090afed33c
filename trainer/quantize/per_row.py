"""Per-row symmetric integers with one fp16 scale a row: the challenge baseline's int8, int6, int5.

A row is everything that shares the first index; a vector is one row. Per row, |w| is clipped at a
percentile c, the scale s is c / levels stored in fp16 (and at least the floor), and a code is
round(w / s). The published script divides by the fp32 scale and multiplies by its fp16 copy when
decoding; here codes are made for the scale that is stored, so inside the clip a weight is never
more than half a step off.

Legend: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.quantize.state import ArraySpec

LARGEST_SCALE = 65504.0
"""The largest fp16 number; beyond levels times this, weights saturate."""
SEARCHED_PERCENTILES = (100.0, 99.999, 99.99, 99.95, 99.9)
"""Candidates of clip = "search": "GPTQ-lite" of the challenge's records of 22 March."""


@dataclass(frozen=True)
class Grid:
    """The numbers that the weights of each row may become: whole multiples of its scale."""

    clip_R: Tensor
    """fp32: |w| beyond it counts as this much."""
    scales_R: Tensor
    """fp16, as stored."""

    @property
    def divisor_R(self) -> Tensor:
        """The scale in fp32; infinite where it is stored as 0, so that the row becomes zeros."""
        scales_R = self.scales_R.float()
        return torch.where(scales_R > 0, scales_R, torch.inf)


@dataclass(frozen=True)
class PerRow:
    """Codes from -levels to levels, one byte each; the entropy coder takes out the unused bits."""

    levels: int

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "codes": ArraySpec("|i1", shape),
            "scales": ArraySpec("<f2", (_rows_and_columns(shape)[0],)),
        }

    def encode(self, tensor: Tensor, config: QuantizeConfig) -> dict[str, np.ndarray]:
        weights_RC = as_rows(tensor)
        grid = self.grid(weights_RC, config)
        return self.arrays(self.round(weights_RC, grid), grid, tuple(tensor.shape))

    def grid(self, weights_RC: Tensor, config: QuantizeConfig) -> Grid:
        """Clip and scale of every row, as the artifact will store them."""
        floor = 1 / self.levels if config.floor_by_levels else config.scale_floor
        if config.clip == "percentile":
            return self._grid_at(weights_RC, config.clip_percentile, floor)
        best = self._grid_at(weights_RC, SEARCHED_PERCENTILES[0], floor)
        least_R = self._squared_error(weights_RC, best)
        for percentile in SEARCHED_PERCENTILES[1:]:
            grid = self._grid_at(weights_RC, percentile, floor)
            error_R = self._squared_error(weights_RC, grid)
            better_R = error_R < least_R
            least_R = torch.where(better_R, error_R, least_R)
            best = Grid(
                torch.where(better_R, grid.clip_R, best.clip_R),
                torch.where(better_R, grid.scales_R, best.scales_R),
            )
        return best

    def round(self, weights_RC: Tensor, grid: Grid) -> Tensor:
        """The nearest code of each weight, int8."""
        clip_R1 = grid.clip_R[:, None]
        codes_RC = torch.clamp(weights_RC, -clip_R1, clip_R1).div_(grid.divisor_R[:, None]).round_()
        return codes_RC.clamp_(-self.levels, self.levels).to(torch.int8)

    def fake(self, tensor: Tensor, config: QuantizeConfig) -> Tensor:
        """What decoding gives back after encoding, bit for bit, on the tensor's device: fp32."""
        weights_RC = as_rows(tensor)
        grid = self.grid(weights_RC, config)
        return _decoded(self.round(weights_RC, grid), grid).reshape(tensor.shape)

    def arrays(self, codes_RC: Tensor, grid: Grid, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Codes and scales as `layout` says."""
        return {
            "codes": codes_RC.reshape(shape).cpu().numpy(),
            "scales": grid.scales_R.cpu().numpy().astype("<f2"),
        }

    def _grid_at(self, weights_RC: Tensor, percentile: float, scale_floor: float) -> Grid:
        clip_R = row_percentile(weights_RC.abs(), percentile)
        floor = torch.tensor(scale_floor, dtype=torch.float32, device=clip_R.device)
        scales_R = torch.maximum(clip_R / self.levels, floor).clamp(max=LARGEST_SCALE).half()
        return Grid(clip_R, scales_R)

    def _squared_error(self, weights_RC: Tensor, grid: Grid) -> Tensor:
        return (weights_RC - _decoded(self.round(weights_RC, grid), grid)).square().sum(1)

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        codes_RC = arrays["codes"].reshape(_rows_and_columns(shape)).astype(np.float32)
        codes_RC *= arrays["scales"].astype(np.float32)[:, None]
        return codes_RC.reshape(shape)


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix of rows that each have a scale, fp32."""
    return tensor.float().reshape(_rows_and_columns(tuple(tensor.shape)))


def _decoded(codes_RC: Tensor, grid: Grid) -> Tensor:
    return codes_RC.float() * grid.scales_R.float()[:, None]


def row_percentile(values_RC: Tensor, percentile: float) -> Tensor:
    """Percentile of each row with linear interpolation, [R], fp32.

    Takes the few largest values of a row instead of sorting it, and has no bound on the number of
    elements (torch.quantile stops at 16 million).

    Args:
        values_RC: at least one column.
        percentile: 0 to 100.
    """
    position = percentile / 100 * (values_RC.size(1) - 1)
    below = math.floor(position)
    largest_RK = values_RC.topk(values_RC.size(1) - below, dim=1).values
    low_R = largest_RK[:, -1]
    high_R = largest_RK[:, -2] if largest_RK.size(1) > 1 else low_R
    return low_R + (high_R - low_R) * (position - below)


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Vectors and scalars are one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
