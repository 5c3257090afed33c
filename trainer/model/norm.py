"""Root-mean-square normalisation without gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square. Fixed, because the library's default depends on the input's dtype."""


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + EPS) over the last axis, in the dtype of x; sums run in fp32 or more."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def build_norm(layer: int, ln_scale: bool) -> Callable[[Tensor], Tensor]:
    """The norm before a block's attention and MLP: with `ln_scale` times 1 / sqrt(layer + 1), so
    that deep layers speak more softly (parameter-golf #315)."""
    return partial(_scaled_rms_norm, 1 / math.sqrt(layer + 1)) if ln_scale else rms_norm


def scale_of(norm: Callable[[Tensor], Tensor]) -> float:
    """The factor that a norm of `build_norm` puts after rms_norm."""
    return float(norm.args[0]) if isinstance(norm, partial) else 1.0


def _scaled_rms_norm(scale: float, x: Tensor) -> Tensor:
    return rms_norm(x) * scale
