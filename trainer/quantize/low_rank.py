"""Low-rank factors that make up for what rounding took from a matrix: W is about Q + A B.

A B is the best approximation of W - Q of its rank, stored either as fp16 factors with the root of
the singular values on both sides (QRES, parameter-golf #1894), or with A in 2 bits and B in 4 (LQER
asymmetric, #1797): A = U S with codes -2 to 1 and one scale, |A|max / 1.5; B = V^T with codes -8 to
7 and a scale, max / 7.5, for each so many numbers of its rows one after another.

Legend: R rows, C columns, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.errors import ArtifactError
from trainer.quantize.per_row import PerRow, as_rows, rows_and_columns
from trainer.quantize.state import ArraySpec

LEFT_RANGE, LEFT_DIVISOR = (-2, 1), 1.5
RIGHT_RANGE, RIGHT_DIVISOR = (-8, 7), 7.5
_SMALLEST = 2.0**-24
"""The smallest fp16 number above 0."""


@dataclass(frozen=True)
class LowRank:
    """Codes of a matrix, and factors that are added when it is decoded."""

    base: PerRow
    rank: int
    group: int = 0
    """Numbers of B that share a scale; 0 = both factors are fp16."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        num_rows, num_columns = rows_and_columns(shape)
        factors, layout = (
            ("<f2", "<f2") if not self.group else ("|i1", "|i1"),
            self.base.layout(shape),
        )
        layout["left"] = ArraySpec(factors[0], (num_rows, self.rank))
        layout["right"] = ArraySpec(factors[1], (self.rank, num_columns))
        if self.group:
            num_scales = -(-self.rank * num_columns // self.group)
            layout["left_scale"] = ArraySpec("<f2", (1,))
            layout["right_scales"] = ArraySpec("<f2", (num_scales,))
        return layout

    def encode(self, tensor: Tensor, config: QuantizeConfig) -> dict[str, np.ndarray]:
        return self.extended(tensor, self.base.encode(tensor, config))

    def extended(self, tensor: Tensor, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of the base scheme, with the factors of what they leave of the tensor."""
        shape = tuple(tensor.shape)
        decoded = torch.from_numpy(self.base.decode(arrays, shape))
        return arrays | self._factors(as_rows(tensor).cpu() - as_rows(decoded))

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Raises: ArtifactError when the rank is above what a matrix of this shape can have."""
        if self.rank > min(rows_and_columns(shape)):  # each rank costs a pass over the matrix
            raise ArtifactError(
                f"artifact: factors of rank {self.rank} for a tensor of shape {list(shape)}; pack "
                "the model again"
            )
        decoded_RC = self.base.decode(arrays, shape).reshape(rows_and_columns(shape))
        left_RK, right_KC = arrays["left"].astype(np.float32), arrays["right"].astype(np.float32)
        if self.group:
            left_RK *= arrays["left_scale"].astype(np.float32)
            scales = np.repeat(arrays["right_scales"].astype(np.float32), self.group)
            right_KC *= scales[: right_KC.size].reshape(right_KC.shape)
        for index in range(self.rank):  # one order of sums on every machine
            decoded_RC += left_RK[:, index, None] * right_KC[index]
        return decoded_RC.reshape(shape)

    def _factors(self, residual_RC: Tensor) -> dict[str, np.ndarray]:
        u_RK, s_K, v_KC = torch.linalg.svd(residual_RC.double(), full_matrices=False)
        u_RK, s_K, v_KC = u_RK[:, : self.rank], s_K[: self.rank], v_KC[: self.rank]
        if not self.group:
            return {
                "left": (u_RK * s_K.sqrt()).numpy().astype("<f2"),
                "right": (s_K.sqrt()[:, None] * v_KC).numpy().astype("<f2"),
            }
        left_RK, right_KC = (u_RK * s_K).numpy(), v_KC.numpy()
        left_scale = _scale(np.abs(left_RK).max().reshape(1), LEFT_DIVISOR)
        groups = np.zeros((-(-right_KC.size // self.group), self.group))
        groups.flat[: right_KC.size] = right_KC.ravel()
        right_scales = _scale(np.abs(groups).max(1), RIGHT_DIVISOR)
        right = _codes(groups, right_scales[:, None], RIGHT_RANGE).ravel()[: right_KC.size]
        return {
            "left": _codes(left_RK, left_scale, LEFT_RANGE),
            "right": right.reshape(right_KC.shape),
            "left_scale": left_scale,
            "right_scales": right_scales,
        }


def _scale(largest: np.ndarray, divisor: float) -> np.ndarray:
    return np.maximum(largest / divisor, _SMALLEST).astype("<f2")


def _codes(values: np.ndarray, scales: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    return np.clip(np.round(values / scales.astype(np.float64)), *bounds).astype("|i1")
