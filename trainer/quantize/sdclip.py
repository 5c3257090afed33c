"""Scales that follow the spread of a row: SDClip (parameter-golf #1394).

s = k std(w) / c with c = 2^(bits - 1) - 1. Trained weights are near-Gaussian, so the entropy of the
codes is about bits - log2(k) plus a constant: after entropy coding k sets the size, not the width.
Its own file because exporter and training penalty (trainer.quantize.qat_lite) share it.

Legend: N matrices, R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 1e-10
"""Of scales before fp16; a row that reaches it is constant, and becomes zeros."""


def sd_clip_scale(weights_NRC: Tensor, bits: int, sigmas: float) -> Tensor:
    """Scale of every row, [N, R], fp32; before the rounding to fp16 that the artifact stores.

    Args:
        weights_NRC: any number of leading axes; the last is a row's.
        bits: of the codes, from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
        sigmas: k, the clip in standard deviations of the row (with Bessel's correction). A row of
            a single number has none: its scale is |w| / c.
    """
    weights_NRC = weights_NRC.float()
    if weights_NRC.size(-1) == 1:
        clip_NR = weights_NRC[..., 0].abs()
    else:
        clip_NR = sigmas * weights_NRC.std(-1)
    return (clip_NR / _levels(bits)).clamp(min=SCALE_FLOOR)


def sd_clip_round(weights_NRC: Tensor, bits: int, sigmas: float) -> Tensor:
    """The weights as they are after storing and decoding, fp32: codes times scales in fp16."""
    scales_NR1 = sd_clip_scale(weights_NRC, bits, sigmas)[..., None].half().float()
    divisor_NR1 = torch.where(scales_NR1 > 0, scales_NR1, torch.inf)
    levels = _levels(bits)
    return (weights_NRC.float() / divisor_NR1).round_().clamp_(-levels, levels).mul_(scales_NR1)


def _levels(bits: int) -> int:
    return (1 << (bits - 1)) - 1
