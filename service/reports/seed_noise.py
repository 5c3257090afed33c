"""How much of a winner's lead was luck: the noise of seeds, and means shrunk by it.

The best of many single runs is the best partly because its seed was kind. The expected score pulls
each configuration towards the middle of the table by the share of the spread that seeds explain:
empirical Bayes with a normal prior (Efron and Morris, JASA 70, 1975). Failures have long tails on
the bad side, so the prior's width comes from the better half of the table alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TYPICAL_SEED_SD = 0.0007
"""Bits per byte: median over published 8xH100 runs of several seeds (0.0006 to 0.0009 by kind of
evaluation); small models vary more."""
MIN_DEGREES = 3
"""Repeated seeds, beyond one per configuration, from which a study's own noise is taken."""
MIN_CONFIGURATIONS = 5
"""Below this there is no spread to speak of, and nothing is shrunk."""


@dataclass(frozen=True)
class SeedNoise:
    """What one more seed does to a score."""

    sd: float
    """Bits per byte."""
    is_own: bool
    """From this study's repeated seeds; otherwise from published runs."""

    def __str__(self) -> str:
        source = (
            "from the repeated seeds of this study"
            if self.is_own
            else "typical of large published runs; small models vary more"
        )
        return f"{self.sd:.4f} bits per byte ({source})"


def seed_noise(groups: Sequence[Sequence[float]]) -> SeedNoise:
    """The deviation between seeds, pooled over configurations that have several.

    Args:
        groups: For each configuration the scores of its seeds, bits per byte.
    """
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if group[1:])
    if degrees < MIN_DEGREES or squares == 0.0:
        return SeedNoise(TYPICAL_SEED_SD, is_own=False)
    return SeedNoise(math.sqrt(squares / degrees), is_own=True)


def shrink(means: Sequence[float], counts: Sequence[int], noise: SeedNoise) -> list[float]:
    """What to expect of a new seed of each configuration, bits per byte.

    Args:
        means: Mean score of each configuration.
        counts: Seeds behind each mean.
        noise: Of one seed.
    """
    if len(means) < MIN_CONFIGURATIONS:
        return list(means)
    middle = statistics.median(means)
    better = [(m, n) for m, n in zip(means, counts, strict=True) if m <= middle]
    seen = statistics.fmean((middle - m) ** 2 for m, _ in better)
    luck = statistics.fmean(noise.sd**2 / n for _, n in better)
    real = max(seen - luck, 0.0)
    return [
        middle + (m - middle) * real / (real + noise.sd**2 / n)
        for m, n in zip(means, counts, strict=True)
    ]
