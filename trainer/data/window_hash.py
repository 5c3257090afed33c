"""Hashes of every window of tokens of one width, for finding equal ones in a large text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import Tokens

MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, 2^64 over the golden ratio: spreads keys over the high bits."""


def window_hashes(
    tokens: Tokens, width: int, step: int = 1, multiplier: int = MULTIPLIER
) -> NDArray[np.uint64]:
    """A key for the `width` tokens from each place 0, step, 2 step, ... on, as far as they go.

    Equal windows have equal keys; of n different ones, two agree with probability about
    n^2 / 2^65. An even multiplier makes that worse."""
    count = max(0, (len(tokens) - width) // step + 1)
    keys = np.zeros(count, dtype=np.uint64)
    for place in range(width if count else 0):
        keys *= np.uint64(multiplier)
        keys += tokens[place : place + (count - 1) * step + 1 : step]
        keys += np.uint64(1)
    keys ^= keys >> np.uint64(32)
    keys *= np.uint64(multiplier)
    return keys
