"""Tensors that stay what they are: 16- or 32-bit floats, and integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.quantize.state import ArraySpec


@dataclass(frozen=True)
class Kept:
    """Stores one array of `stored`; `computed` is the type that decoding gives back."""

    stored: str
    computed: str

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"values": ArraySpec(self.stored, shape)}

    def encode(self, tensor: Tensor, config: QuantizeConfig) -> dict[str, np.ndarray]:
        if tensor.dtype is torch.bfloat16:  # numpy has no such type; fp32 holds every value of it
            tensor = tensor.float()
        return {"values": tensor.cpu().numpy().astype(self.stored, order="C")}

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return arrays["values"].reshape(shape).astype(self.computed)
