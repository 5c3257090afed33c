"""Bytes shared out among tensors: against every combination there is. CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.quantize.rate_distortion import Curve, allocate, lower_hull


def _curves(count: int, options: int, seed: int) -> list[Curve]:
    """More bytes, less loss, with a scatter, so that some options lie above the hull."""
    random = np.random.default_rng(seed)
    curves = []
    for _ in range(count):
        num_bytes = np.sort(random.uniform(10, 1000, options))
        increases = np.exp(-num_bytes / random.uniform(50, 500)) * random.uniform(0.8, 1.2, options)
        order = random.permutation(options)
        curves.append(Curve(num_bytes[order], increases[order]))
    return curves


def _cost(curves: list[Curve], chosen: tuple[int, ...] | list[int]) -> tuple[float, float]:
    pairs = list(zip(curves, chosen, strict=True))
    return sum(c.num_bytes[i] for c, i in pairs), sum(c.increases[i] for c, i in pairs)


def _best(curves: list[Curve], cap: float) -> float:
    """By trying all combinations."""
    every = itertools.product(*(range(len(curve.num_bytes)) for curve in curves))
    return min(loss for size, loss in (_cost(curves, c) for c in every) if size <= cap)


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_on_the_hulls_budget_is_better(seed: int) -> None:
    """At a price, the choice of each curve alone is the best of all combinations of its bytes."""
    curves = _curves(4, 6, seed)
    for price in (1e-4, 1e-3, 4e-3):
        by_price = [int(np.argmin(c.increases + price * c.num_bytes)) for c in curves]
        cap, loss = _cost(curves, by_price)
        assert _best(curves, cap) == pytest.approx(loss)
        chosen = allocate(curves, cap * (1 + 1e-12))
        assert _cost(curves, chosen)[1] == pytest.approx(loss)


@pytest.mark.parametrize("seed", range(12))
def test_any_budget_is_kept_and_within_a_step_of_the_best(seed: int) -> None:
    curves = _curves(4, 6, 100 + seed)
    least = sum(curve.num_bytes.min() for curve in curves)
    most = sum(curve.num_bytes.max() for curve in curves)
    for cap in np.linspace(least, most, 7):
        size, loss = _cost(curves, allocate(curves, cap))
        assert size <= cap + 1e-9
        steps = [np.diff(c.increases[lower_hull(c)]) for c in curves]
        largest = max(float(-step.min()) if len(step) else 0.0 for step in steps)
        assert loss <= _best(curves, cap) + largest + 1e-12


def test_what_never_fits_takes_the_smallest_of_all() -> None:
    curves = _curves(3, 5, 1)
    assert allocate(curves, 0.0) == [int(curve.num_bytes.argmin()) for curve in curves]


def test_the_hull_is_convex_and_below_every_option() -> None:
    for curve in _curves(30, 9, 5):
        hull = lower_hull(curve)
        sizes, losses = curve.num_bytes[hull], curve.increases[hull]
        slopes = np.diff(losses) / np.diff(sizes)
        assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
        assert (np.diff(slopes) >= 0).all()
        below = np.interp(curve.num_bytes, sizes, losses)
        assert (curve.increases >= below - 1e-12).all()
