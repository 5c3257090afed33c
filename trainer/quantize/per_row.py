"""Per-row symmetric integers with one fp16 scale a row: the challenge baseline's int8, and int6.

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
        weights_RC = tensor.float().reshape(_rows_and_columns(tuple(tensor.shape)))
        clip_R = row_percentile(weights_RC.abs(), config.clip_percentile)
        floor = torch.tensor(config.scale_floor, dtype=torch.float32, device=clip_R.device)
        scales_R = torch.maximum(clip_R / self.levels, floor).clamp(max=LARGEST_SCALE).half()
        step_R1, clip_R1 = scales_R.float()[:, None], clip_R[:, None]
        # A scale below the smallest fp16 number is stored as 0, and the row decodes to zeros.
        divisor_R1 = torch.where(step_R1 > 0, step_R1, torch.inf)
        codes_RC = torch.clamp(weights_RC, -clip_R1, clip_R1).div_(divisor_R1).round_()
        codes_RC = codes_RC.clamp_(-self.levels, self.levels).to(torch.int8)
        return {
            "codes": codes_RC.reshape(tensor.shape).cpu().numpy(),
            "scales": scales_R.cpu().numpy().astype("<f2"),
        }

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        codes_RC = arrays["codes"].reshape(_rows_and_columns(shape)).astype(np.float32)
        codes_RC *= arrays["scales"].astype(np.float32)[:, None]
        return codes_RC.reshape(shape)


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
