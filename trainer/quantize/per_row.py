"""Per-row symmetric integers with one scale a row: the challenge baseline's int8, and 7 to 4 bits.

A row is everything that shares the first index; a vector is one row. Per row, a rule (grid.py)
chooses the scale s, stored in fp16, and a code is round(w / s). The published script divides by the
fp32 scale and multiplies by its fp16 copy when decoding; here codes are made for the scale that is
stored, so inside the clip a weight is never more than half a step off.

Legend: R rows, C columns, G groups of columns at 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.errors import ArtifactError
from trainer.quantize.grid import (
    HIGH_LEVELS,
    Grid,
    HighColumns,
    choose_grid,
    compact,
    row_percentile,
)
from trainer.quantize.state import ArraySpec

__all__ = ["HIGH_LEVELS", "Grid", "PerRow", "as_rows", "row_percentile", "rows_and_columns"]


@dataclass(frozen=True)
class PerRow:
    """Codes from -levels to levels, one byte each; the entropy coder takes out the unused bits."""

    levels: int
    has_step: bool = False
    """Scales are multiples of one step, a byte each (quantize.scale_bits = 8)."""
    num_high: int = 0
    """Groups of columns at 8 bits (quantize.awq_groups)."""
    high_columns: int = 0
    """Columns of such a group."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        num_rows, _ = rows_and_columns(shape)
        layout = {"codes": ArraySpec("|i1", shape)}
        if self.has_step:
            layout |= {"multiples": ArraySpec("|u1", (num_rows,)), "step": ArraySpec("<f2", (1,))}
        else:
            layout["scales"] = ArraySpec("<f2", (num_rows,))
        if self.num_high:
            layout["high_starts"] = ArraySpec("<i2", (self.num_high,))
            layout["high_scales"] = ArraySpec("<f2", (self.num_high, num_rows))
        return layout

    def encode(
        self,
        tensor: Tensor,
        config: QuantizeConfig,
        moments_C: Tensor | None = None,
        starts: tuple[int, ...] = (),
    ) -> dict[str, np.ndarray]:
        weights_RC = as_rows(tensor)
        grid = self.grid(weights_RC, config, moments_C, starts)
        return self.arrays(self.round(weights_RC, grid), grid, tuple(tensor.shape))

    def grid(
        self,
        weights_RC: Tensor,
        config: QuantizeConfig,
        moments_C: Tensor | None = None,
        starts: tuple[int, ...] = (),
    ) -> Grid:
        """Clip and scale of every row, as the artifact will store them.

        Args:
            config: of this tensor (`QuantizeConfig.for_tensor`).
            moments_C: mean squares of the inputs, where they are known.
            starts: first columns of the groups at 8 bits.
        """
        grid = choose_grid(weights_RC, self.levels, config, moments_C)
        if self.has_step:
            grid = compact(grid)
        assert len(starts) == self.num_high
        return replace(
            grid, high=tuple(self._high(weights_RC, config, moments_C, start) for start in starts)
        )

    def _high(
        self, weights_RC: Tensor, config: QuantizeConfig, moments_C: Tensor | None, start: int
    ) -> HighColumns:
        columns = slice(start, start + self.high_columns)
        moments = None if moments_C is None else moments_C[columns]
        own = choose_grid(weights_RC[:, columns], HIGH_LEVELS, config, moments)
        return HighColumns(start, self.high_columns, own)

    def round(self, weights_RC: Tensor, grid: Grid) -> Tensor:
        """The nearest code of each weight, int8."""
        return grid.codes(weights_RC, self.levels)

    def fake(self, tensor: Tensor, config: QuantizeConfig) -> Tensor:
        """What decoding gives back after encoding, bit for bit, on the tensor's device: fp32."""
        weights_RC = as_rows(tensor)
        grid = self.grid(weights_RC, config)
        return grid.decoded(self.round(weights_RC, grid)).reshape(tensor.shape)

    def arrays(self, codes_RC: Tensor, grid: Grid, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Codes and scales as `layout` says."""
        arrays = {"codes": codes_RC.reshape(shape).cpu().numpy()}
        if grid.step is None:
            arrays["scales"] = _half(grid.scales_R)
        else:
            multiples_R = (grid.scales_R / grid.step.float()).round()
            arrays["multiples"] = multiples_R.cpu().numpy().astype("|u1")
            arrays["step"] = _half(grid.step.reshape(1))
        if grid.high:
            arrays["high_starts"] = np.array([part.start for part in grid.high], "<i2")
            arrays["high_scales"] = _half(torch.stack([part.grid.scales_R for part in grid.high]))
        return arrays

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Raises: ArtifactError when a group of columns lies outside the matrix, or when groups
        take more columns than there are."""
        codes_RC = arrays["codes"].reshape(rows_and_columns(shape))
        if self.num_high * self.high_columns > codes_RC.shape[1]:
            raise ArtifactError(
                f"artifact: {self.num_high} groups of {self.high_columns} columns at 8 bits in a "
                f"matrix of {codes_RC.shape[1]}; pack the model again"
            )
        if self.has_step:
            scales_R = arrays["multiples"].astype(np.float32) * arrays["step"].astype(np.float32)
        else:
            scales_R = arrays["scales"].astype(np.float32)
        decoded_RC = codes_RC.astype(np.float32)
        decoded_RC *= scales_R[:, None]
        for index in range(self.num_high):
            start = int(arrays["high_starts"][index])
            if not 0 <= start <= codes_RC.shape[1] - self.high_columns:
                raise ArtifactError(
                    f"artifact: its columns at 8 bits begin at {start} in a matrix of "
                    f"{codes_RC.shape[1]}; pack the model again"
                )
            columns = slice(start, start + self.high_columns)
            own_R = arrays["high_scales"][index].astype(np.float32)
            decoded_RC[:, columns] = codes_RC[:, columns].astype(np.float32) * own_R[:, None]
        return decoded_RC.reshape(shape)


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix of rows that each have a scale, fp32."""
    return tensor.float().reshape(rows_and_columns(tuple(tensor.shape)))


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Vectors and scalars are one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _half(scales: Tensor) -> np.ndarray:
    return scales.cpu().numpy().astype("<f2")
