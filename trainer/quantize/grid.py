"""The numbers that the weights of a matrix may become, and the rules that choose them.

A row's numbers are the whole multiples of its scale. Rules by percentile look at the row alone;
rules by standard deviations (SDClip, parameter-golf #1394) set the entropy of the codes of
near-Gaussian weights, which is bits - log2(k) plus a constant; two of them also look at the mean
squares of what the matrix multiplies.

Legend: R rows, C columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.config.quantize import SIGMA_CLIPS
from trainer.quantize.sdclip import sd_clip_scale

LARGEST_SCALE = 65504.0
"""The largest fp16 number; beyond levels times this, weights saturate."""
SEARCHED_PERCENTILES = (100.0, 99.999, 99.99, 99.95, 99.9)
"""Candidates of clip = "search": "GPTQ-lite" of the challenge's records of 22 March."""


HIGH_LEVELS = 127
"""Largest code in the columns that are kept at 8 bits."""


@dataclass(frozen=True)
class Grid:
    """What the weights of each row may become: whole multiples of its scale."""

    clip_R: Tensor
    """fp32: |w| beyond it counts as this much; infinite where only the codes' range bounds it."""
    scales_R: Tensor
    """As decoded: fp16, or fp32 where they are multiples of `step`."""
    step: Tensor | None = None
    """fp16 scalar: the scales are stored as its multiples from 1 to 255; None = as they are."""
    high: tuple[HighColumns, ...] = ()
    """Columns with a finer grid of their own."""

    @property
    def divisor_R(self) -> Tensor:
        """The scale in fp32; infinite where it is stored as 0, so that the row becomes zeros."""
        return divisor(self.scales_R.float())

    def codes(self, weights_RC: Tensor, levels: int) -> Tensor:
        """The nearest code of each weight, int8."""
        clip_R1 = self.clip_R[:, None]
        codes_RC = torch.clamp(weights_RC, -clip_R1, clip_R1).div_(self.divisor_R[:, None]).round_()
        codes_RC = codes_RC.clamp_(-levels, levels).to(torch.int8)
        for part in self.high:
            codes_RC[:, part.columns] = part.grid.codes(weights_RC[:, part.columns], HIGH_LEVELS)
        return codes_RC

    def decoded(self, codes_RC: Tensor) -> Tensor:
        """The weights that codes stand for, fp32."""
        return codes_RC.float() * self.scales_RC(codes_RC.size(1)).float()

    def scales_RC(self, num_columns: int) -> Tensor:
        """The scale of every weight, expanded where all columns share it."""
        scales_RC = self.scales_R[:, None].expand(-1, num_columns)
        if self.high:
            scales_RC = scales_RC.clone()
        for part in self.high:
            scales_RC[:, part.columns] = part.grid.scales_R[:, None]
        return scales_RC

    def levels_C(self, levels: int, num_columns: int) -> list[int]:
        """The largest code of every column."""
        levels_C = [levels] * num_columns
        for part in self.high:
            levels_C[part.columns] = [HIGH_LEVELS] * part.grid_width
        return levels_C


@dataclass(frozen=True)
class HighColumns:
    """Neighbouring columns of a matrix that are kept at 8 bits (AWQ-lite, parameter-golf #1908)."""

    start: int
    grid_width: int
    grid: Grid

    @property
    def columns(self) -> slice:
        """Where they are."""
        return slice(self.start, self.start + self.grid_width)


def divisor(scales: Tensor) -> Tensor:
    """What weights are divided by: the scale, infinite where it is 0."""
    return torch.where(scales > 0, scales, torch.inf)


def compact(grid: Grid) -> Grid:
    """The grid with its scales as whole multiples, 1 to 255, of one fp16 step (parameter-golf
    #1894). Rows of which the scale is below 1/510 of the largest get a coarser one."""
    scales_R = grid.scales_R.float()
    smallest = torch.tensor(2.0**-24, device=scales_R.device)
    step = torch.maximum(scales_R.max() / 255, smallest).half()
    multiples_R = (scales_R / step.float()).round().clamp(1, 255)
    return replace(grid, scales_R=multiples_R * step.float(), step=step)


def choose_grid(
    weights_RC: Tensor, levels: int, config: QuantizeConfig, moments_C: Tensor | None = None
) -> Grid:
    """Clip and scale of every row, as the artifact will store them.

    Args:
        config: of this tensor (`QuantizeConfig.for_tensor`).
        moments_C: mean squares of the inputs, for the rules that look at them; None = a tensor
            without inputs, which these rules treat as "sigma" does.
    """
    floor = 1 / levels if config.floor_by_levels else config.scale_floor
    if config.clip in SIGMA_CLIPS:
        return _sigma_grid(weights_RC, levels, config, floor, moments_C)
    if config.clip == "percentile":
        return _percentile_grid(weights_RC, levels, config.clip_percentile, floor)
    return _searched_grid(weights_RC, levels, floor)


def _percentile_grid(weights_RC: Tensor, levels: int, percentile: float, floor: float) -> Grid:
    clip_R = row_percentile(weights_RC.abs(), percentile)
    return Grid(clip_R, _stored(clip_R / levels, floor))


def _searched_grid(weights_RC: Tensor, levels: int, floor: float) -> Grid:
    """Per row the percentile with the least squared error."""
    best = _percentile_grid(weights_RC, levels, SEARCHED_PERCENTILES[0], floor)
    least_R = _squared_error(weights_RC, levels, best).sum(1)
    for percentile in SEARCHED_PERCENTILES[1:]:
        grid = _percentile_grid(weights_RC, levels, percentile, floor)
        error_R = _squared_error(weights_RC, levels, grid).sum(1)
        better_R = error_R < least_R
        least_R = torch.where(better_R, error_R, least_R)
        best = Grid(
            torch.where(better_R, grid.clip_R, best.clip_R),
            torch.where(better_R, grid.scales_R, best.scales_R),
        )
    return best


def _sigma_grid(
    weights_RC: Tensor,
    levels: int,
    config: QuantizeConfig,
    floor: float,
    moments_C: Tensor | None,
) -> Grid:
    scales_R = sd_clip_scale(weights_RC, levels.bit_length() + 1, config.clip_sigmas)
    if config.clip == "sigma" or moments_C is None:
        return _unclipped(scales_R, floor)
    if config.clip == "hessian_sigma":
        weight_R = (weights_RC.abs() * moments_C.clamp(min=0)).mean(1)
        relative_R = weight_R / weight_R.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return _unclipped(scales_R * (1 + config.hessian_clip_lambda * (relative_R - 1)), floor)
    widths = torch.linspace(
        config.clip_search_low, config.clip_search_high, config.clip_search_points
    )
    grids = [_unclipped(scales_R * float(width), floor) for width in widths]
    errors = [
        float((_squared_error(weights_RC, levels, grid) * moments_C).sum(dtype=torch.float64))
        for grid in grids
    ]
    return grids[errors.index(min(errors))]


def _unclipped(scales_R: Tensor, floor: float) -> Grid:
    return Grid(torch.full_like(scales_R, torch.inf), _stored(scales_R, floor))


def _stored(scales_R: Tensor, floor: float) -> Tensor:
    lowest = torch.tensor(floor, dtype=torch.float32, device=scales_R.device)
    return torch.maximum(scales_R, lowest).clamp(max=LARGEST_SCALE).half()


def _squared_error(weights_RC: Tensor, levels: int, grid: Grid) -> Tensor:
    return (weights_RC - grid.decoded(grid.codes(weights_RC, levels))).square()


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
