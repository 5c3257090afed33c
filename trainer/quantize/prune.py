"""Codes of 1 and -1 that become 0, the cheapest first, until an artifact fits (parameter-golf,
"selective pruning" of March): zeros cost an entropy coder least.

A code's price is the squared step that it stands for, times the mean square of its input where that
is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from trainer.quantize.per_row import rows_and_columns
from trainer.quantize.schemes import scheme_named
from trainer.quantize.state import QuantizedState, QuantizedTensor

TRIES = 6
"""Artifacts that are made in search of the fewest pruned codes, at most."""
SLACK = 0.0005
"""An artifact that leaves no more of its bytes unused than this share is good enough."""


class Pruner:
    """All ones of a model, by price."""

    def __init__(self, quantized: QuantizedState, hessians: Mapping[str, Tensor]) -> None:
        self._quantized = quantized
        self._places: dict[str, np.ndarray] = {}
        prices: list[np.ndarray] = []
        for name, stored in quantized.tensors.items():
            if stored.scheme.startswith("int") and "codes" in stored.arrays:
                place, price = _ones(stored, hessians.get(name))
                self._places[name] = place
                prices.append(price)
        price = np.concatenate([np.zeros(0), *prices])
        self._rank = np.empty(len(price), np.int64)
        self._rank[np.argsort(price, kind="stable")] = np.arange(len(price))

    @property
    def num_ones(self) -> int:
        """Codes of 1 and -1."""
        return len(self._rank)

    def pruned(self, count: int) -> QuantizedState:
        """The model without its `count` cheapest ones."""
        tensors = dict(self._quantized.tensors)
        start = 0
        for name, place in self._places.items():
            gone = place[self._rank[start : start + len(place)] < count]
            start += len(place)
            codes = tensors[name].arrays["codes"].copy()
            codes.flat[gone] = 0
            arrays = {**tensors[name].arrays, "codes": codes}
            tensors[name] = replace(tensors[name], arrays=arrays)
        return replace(self._quantized, tensors=tensors)


def prune_to_fit(
    quantized: QuantizedState,
    hessians: Mapping[str, Tensor],
    cap: int,
    encode: Callable[[QuantizedState], bytes],
) -> tuple[bytes, int]:
    """The artifact and the number of codes pruned; the whole one where it fits, and where even
    without any ones it would not.

    The size falls about linearly with the count, so each next try is where a line through the
    nearest sizes meets the cap. Where two tries in a row miss on one side, the far end counts half
    (the Illinois rule): a bent curve would keep it for good.
    """
    whole = encode(quantized)
    if len(whole) <= cap:
        return whole, 0
    pruner = Pruner(quantized, hessians)
    low, high = 0, pruner.num_ones
    best = encode(pruner.pruned(high))
    if len(best) > cap:
        return whole, 0
    over, under, did_fit = float(len(whole) - cap), float(cap - len(best)), True
    for _ in range(TRIES):
        if cap - len(best) <= SLACK * cap or high - low <= 1:
            break
        share = over / (over + under)
        count = min(max(low + 1, low + round((high - low) * share * (1 + SLACK))), high - 1)
        tried = encode(pruner.pruned(count))
        fits = len(tried) <= cap
        if fits:
            high, best, under = count, tried, float(cap - len(tried))
            over /= 1 + did_fit
        else:
            low, over = count, float(len(tried) - cap)
            under /= 2 - did_fit
        did_fit = fits
    return best, high


def _ones(stored: QuantizedTensor, hessian_CC: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of the codes of 1 and -1, and their prices."""
    shape = rows_and_columns(stored.shape)
    codes = stored.arrays["codes"].reshape(shape)
    ones = {**stored.arrays, "codes": np.ones_like(stored.arrays["codes"])}
    scheme = scheme_named(stored.scheme)
    base = getattr(scheme, "base", scheme)
    steps_RC = base.decode(ones, stored.shape).reshape(shape).astype(np.float64)
    if hessian_CC is not None:
        steps_RC *= np.sqrt(hessian_CC.diagonal().double().clamp(min=0).cpu().numpy())
    place = np.flatnonzero(np.abs(codes) == 1)
    return place, np.square(steps_RC.flat[place])
