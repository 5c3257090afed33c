"""Bytes shared out among tensors so that the loss grows least: one option each, under a common cap.

Each tensor's options are points (bytes, increase of the loss). At a price for a byte, every tensor
takes the option with the least increase + price x bytes, on the lower hull of its points; the
price falls until no more bytes are left (Shoham and Gersho, 1988). What is left then goes to
single steps along any option, best gain per byte first. The result is within one step of one tensor
of the optimum, and is the optimum where the hull meets the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """What one tensor may become."""

    num_bytes: np.ndarray
    """[options]"""
    increases: np.ndarray
    """[options], nats per token."""


def lower_hull(curve: Curve) -> list[int]:
    """Options on the lower left hull, by rising bytes and falling increase."""
    hull: list[int] = []
    order = np.lexsort((curve.increases, curve.num_bytes))
    for option in order.tolist():
        if hull and curve.increases[option] >= curve.increases[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(curve, hull[-2], hull[-1]) <= _gain(curve, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def allocate(curves: Sequence[Curve], cap: float) -> list[int]:
    """An option for each curve, of at most `cap` bytes together; the smallest of each where that is
    impossible."""
    hulls = [lower_hull(curve) for curve in curves]
    steps = sorted(
        (-_gain(curve, hull[place], hull[place + 1]), number, place)
        for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for place in range(len(hull) - 1)
    )
    chosen = [hull[0] for hull in hulls]
    used = float(sum(curve.num_bytes[option] for curve, option in zip(curves, chosen, strict=True)))
    for _, number, place in steps:
        num_bytes, larger = curves[number].num_bytes, hulls[number][place + 1]
        step = float(num_bytes[larger] - num_bytes[hulls[number][place]])
        if used + step > cap:
            break
        chosen[number] = larger
        used += step
    return _filled(curves, chosen, cap - used)


def _filled(curves: Sequence[Curve], chosen: list[int], left: float) -> list[int]:
    """Single steps to any option that fits, by gain per byte, until none does."""
    while True:
        best, best_gain = None, 0.0
        for number, curve in enumerate(curves):
            now = chosen[number]
            more = curve.num_bytes - curve.num_bytes[now]
            less = curve.increases[now] - curve.increases
            fits = (more <= left) & (less > 0)
            if not fits.any():
                continue
            gains = np.where(fits, less / np.maximum(more, 1e-9), -np.inf)
            option = int(gains.argmax())
            if gains[option] > best_gain:
                best, best_gain = (number, option), float(gains[option])
        if best is None:
            return chosen
        number, option = best
        curve = curves[number]
        left -= float(curve.num_bytes[option] - curve.num_bytes[chosen[number]])
        chosen[number] = option


def _gain(curve: Curve, start: int, end: int) -> float:
    """Fall of the increase per byte from one option to a larger one."""
    more = curve.num_bytes[end] - curve.num_bytes[start]
    less = float(curve.increases[start] - curve.increases[end])
    return less / float(more) if more > 0 else np.inf
