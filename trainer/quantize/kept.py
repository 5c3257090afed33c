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


@dataclass(frozen=True)
class Flat:
    """8 bits with one scale for the whole tensor: control tensors of a compact artifact
    (parameter-golf #1894)."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"codes": ArraySpec("|i1", shape), "scale": ArraySpec("<f2", (1,))}

    def encode(self, tensor: Tensor, config: QuantizeConfig) -> dict[str, np.ndarray]:
        values = tensor.double().cpu().numpy()
        largest = np.abs(values).max(initial=0.0)
        scale = np.clip(largest / 127, 2.0**-24, 65504.0).astype("<f2").reshape(1)
        codes = np.clip(np.round(values / scale.astype(np.float64)), -127, 127)
        return {"codes": codes.astype("|i1").reshape(tuple(tensor.shape)), "scale": scale}

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        decoded = arrays["codes"].reshape(shape).astype(np.float32)
        decoded *= arrays["scale"].astype(np.float32)[0]
        return decoded
