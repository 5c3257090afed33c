"""Quantised weights as plain data: numpy arrays and names, no torch object.

What a tensor is stored as follows from its scheme and shape alone (`Scheme.layout`), so a reader of
an artifact knows every size before it touches a byte of content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from trainer.config import QuantizeConfig


@dataclass(frozen=True)
class ArraySpec:
    """Type and shape of one stored array."""

    dtype: str
    """Numpy's name of a little-endian type, such as "<f2"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array, exact for shapes of any size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Scheme(Protocol):
    """One way to store a tensor; the table SCHEMES names them."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """The arrays that a tensor of this shape is stored as, in their stored order."""
        ...

    def encode(self, tensor: Tensor, config: QuantizeConfig) -> dict[str, np.ndarray]:
        """Arrays as `layout` says. The tensor is finite and may live on any device."""
        ...

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The values to compute with: a new fp32 array (int64 for integers) of `shape`."""
        ...


@dataclass(frozen=True)
class QuantizedTensor:
    """One stored tensor."""

    scheme: str
    """Key of SCHEMES."""
    shape: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class QuantizedState:
    """A whole model, quantised. Names are those of the state dict, in its order."""

    tensors: Mapping[str, QuantizedTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tied tensors: name -> name under which the shared values are stored."""
