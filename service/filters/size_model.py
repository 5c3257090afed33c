"""How a packed model's bytes compare with what arithmetic reckons: a distribution, learned online.

The quantity is log(measured / reckoned), so that one artifact says something of others of any size.
It is a sum of Gaussian parts: one for each group that an artifact belongs to (its clip rule, its
way of coding, the line of work it comes from, its recipe, its exact settings), one that changes
smoothly with a few numbers (budget, parameters, widths of the clips), and noise between seeds. That
is a Gaussian process, conditioned exactly on what was measured: every artifact moves the forecast
of its neighbours, the nearest most. Rasmussen and Williams, Gaussian Processes for Machine
Learning, chapter 2 (conditioning) and 4 (sums of kernels).

How wide the interval must be is learned apart, from how far off earlier forecasts were: log |z| has
a mean per situation (were the settings seen before? the recipe? nothing?), per way of coding in it,
and per line of work in it, each shrunk to the one before. The forecast is a Student t distribution
of that scale; its tails are those of sizes measured (a few jump by per cents with the seed alone).

Plain numpy on arrays; a forecast reads at most NEAREST artifacts, so a study may be of any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, stdtr, stdtrit

GROUPS = ("clip", "way", "line", "recipe", "settings")
"""What artifacts may have in common, from coarse to fine."""
NUMBERS = {
    "log_budget": 1.0,
    "log_steps": 1.0,
    "log_params": 0.3,
    "log_batch": 0.5,
    "log_row": 0.5,
    "sigmas": 2.0,
    "embed_sigmas": 3.0,
    "embed_bits": 1.0,
}
"""What artifacts differ in by degrees, with the unit that differences are counted in. Budget is in
device seconds, row in tokens; sigmas are the clips in standard deviations."""
ONE_UNKNOWN = 2.0
"""Units between a number and a missing one; two missing ones are equal."""
FURTHEST = 20.0
"""Units beyond which a difference does not grow."""
NEAREST = 128
FORGETS = 0.98
"""Weight of an earlier error against the next one of the same kind."""
SHRINK = (10.0, 4.0, 2.0)
"""Errors that the coarser scale counts as: of a situation, of a way in it, of a line in it."""
LEAST_Z = 0.02
"""Smaller errors, in spreads, count as this: luck, not skill."""
LEAST_NOISE = 0.1
"""Of SizeHyper.noise: what noise is learned to be stays within this factor."""
LEAST_SPREAD = 0.0003
"""Of the log ratio. Seeds alone move a size by 0.0001 to 0.0003 in the steadiest kinds."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SizeFacts:
    """What is known of an artifact before it is made."""

    groups: tuple[str | None, ...]
    """One name for each of GROUPS; None is like nothing else."""
    numbers: tuple[float | None, ...]
    """One for each of NUMBERS; None where unknown."""
    scale_free: bool = False
    """Steps of the codes follow the weights, so that neither decay nor length of training moves
    their entropy."""


@dataclass(frozen=True)
class SizeHyper:
    """What the public runs fixed; the rest is learned. Standard deviations of the log ratio."""

    mean: float
    """Of the log ratio before anything is known."""
    group_spreads: tuple[float, ...]
    """One for each of GROUPS."""
    smooth_way: float
    """Of the part that changes smoothly with the numbers, apart for each way of coding."""
    smooth_all: float
    """The same, common to all."""
    weights: tuple[float, ...]
    """Of each squared difference in NUMBERS; 0 = it says nothing."""
    steady: float
    """Share of the smooth parts that is left where the codes are free of scale."""
    noise: float
    """Between seeds of the same settings."""
    dof: float
    """Degrees of freedom of the forecast: small = heavy tails."""
    log_scales: tuple[float, ...]
    """For each situation (0 = nothing seen, then as GROUPS): log of the width that forecasts needed
    over the one that they claimed."""


@dataclass(frozen=True)
class LogRatio:
    """Student t distribution of log(measured / reckoned)."""

    mean: float
    spread: float
    dof: float
    situation: int
    """How near the nearest artifact seen is: 0 = not at all, else the place in GROUPS from 1 on."""

    def quantile(self, probability: float) -> float:
        return self.mean + self.spread * float(stdtrit(self.dof, probability))

    def above(self, value: float) -> float:
        """Probability that the log ratio is above `value`."""
        return float(stdtr(self.dof, (self.mean - value) / self.spread))


@dataclass
class SizeTable:
    """Facts as arrays. N artifacts, G groups, F numbers."""

    groups_NG: Ints
    """Names as numbers; a missing name is a negative number of its own."""
    numbers_NF: Floats
    """In the units of NUMBERS; NaN where unknown."""
    free_N: NDArray[np.bool_]
    """Where the codes are free of scale."""

    @classmethod
    def of(cls, facts: Sequence[SizeFacts], codes: dict[tuple[int, str], int]) -> SizeTable:
        """Args:
        codes: Numbers given to names so far; grows.
        """
        groups = np.empty((len(facts), len(GROUPS)), np.int64)
        for row, fact in enumerate(facts):
            for level, name in enumerate(fact.groups):
                key = (level, name if name is not None else f"\0{len(codes)}")
                groups[row, level] = codes.setdefault(key, len(codes))
        numbers = np.array([fact.numbers for fact in facts], np.float64)
        units = np.array(list(NUMBERS.values()))
        free = np.array([fact.scale_free for fact in facts], bool)
        return cls(groups, numbers.reshape(len(facts), len(NUMBERS)) / units, free)

    def take(self, rows: Ints) -> SizeTable:
        return SizeTable(self.groups_NG[rows], self.numbers_NF[rows], self.free_N[rows])

    def joined(self, other: SizeTable) -> SizeTable:
        return SizeTable(
            np.concatenate([self.groups_NG, other.groups_NG]),
            np.concatenate([self.numbers_NF, other.numbers_NF]),
            np.concatenate([self.free_N, other.free_N]),
        )


def kernel(hyper: SizeHyper, first: SizeTable, second: SizeTable) -> Floats:
    """Covariance of the log ratios of two tables, without noise, (N, M)."""
    same_GNM = [
        first.groups_NG[:, None, level] == second.groups_NG[None, :, level]
        for level in range(len(GROUPS))
    ]
    swing_N, swing_M = (np.where(t.free_N, hyper.steady, 1.0) for t in (first, second))
    smooth_NM = np.exp(-np.sqrt(_squares(hyper.weights, first, second)))
    smooth_NM *= swing_N[:, None] * swing_M
    out_NM = hyper.smooth_all**2 * smooth_NM
    out_NM += hyper.smooth_way**2 * smooth_NM * same_GNM[GROUPS.index("way")]
    for spread, same_NM in zip(hyper.group_spreads, same_GNM, strict=True):
        out_NM += spread**2 * same_NM
    return out_NM


def _squares(weights: tuple[float, ...], first: SizeTable, second: SizeTable) -> Floats:
    """Weighted squared distance in NUMBERS, (N, M)."""
    out_NM = np.zeros((len(first.numbers_NF), len(second.numbers_NF)))
    for index, weight in enumerate(weights):
        one_N1, two_1M = first.numbers_NF[:, index, None], second.numbers_NF[None, :, index]
        known_NM = np.clip(np.abs(one_N1 - two_1M), 0, FURTHEST)
        unknown_NM = np.where(np.isnan(one_N1) & np.isnan(two_1M), 0.0, ONE_UNKNOWN)
        out_NM += weight * np.where(np.isnan(known_NM), unknown_NM, known_NM) ** 2
    return out_NM


@dataclass
class _Scale:
    """Decaying mean of log |z|, as its sum and its weight."""

    total: float = 0.0
    weight: float = 0.0

    def shrunk(self, to: float, weight: float) -> float:
        return (weight * to + self.total) / (weight + self.weight)

    def add(self, value: float) -> None:
        self.total = FORGETS * self.total + value
        self.weight = FORGETS * self.weight + 1.0


@dataclass
class SizeModel:
    """Forecasts log ratios and learns from measured ones, in the order in which they come."""

    hyper: SizeHyper
    measured: int = 0
    """Artifacts learned from, without the prior's."""
    _codes: dict[tuple[int, str], int] = field(default_factory=dict)
    _scales: dict[tuple[int | str | None, ...], _Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._table = SizeTable.of([], self._codes)
        self._ratios_N = np.empty(0)
        self._noise_N = np.empty(0)

    def assume(self, facts: SizeFacts, log_ratio: float, spread: float) -> None:
        """Take in a fact of the prior: the log ratio is known up to `spread`."""
        self._table = self._table.joined(SizeTable.of([facts], self._codes))
        self._ratios_N = np.append(self._ratios_N, log_ratio)
        self._noise_N = np.append(self._noise_N, spread**2)

    def learn(self, facts: SizeFacts, log_ratio: float) -> LogRatio:
        """Take in a measured artifact.

        Returns:
            The forecast that stood just before.
        """
        mean, spread, situation = self._posterior(facts)
        forecast = self._widened(facts, mean, spread, situation)
        error = math.log(max(abs(log_ratio - mean) / spread, LEAST_Z)) - _mean_log(self.hyper.dof)
        for key in _scale_keys(facts, situation):
            self._scales.setdefault(key, _Scale()).add(error)
        self.assume(facts, log_ratio, self._noise(facts))
        self.measured += 1
        return forecast

    def predict(self, facts: SizeFacts) -> LogRatio:
        return self._widened(facts, *self._posterior(facts))

    def log_scales(self) -> tuple[float, ...]:
        """For each situation, the width that forecasts needed, as SizeHyper.log_scales."""
        means = enumerate(self.hyper.log_scales)
        return tuple(
            self._scales.get((situation,), _Scale()).shrunk(mean, SHRINK[0])
            for situation, mean in means
        )

    def _noise(self, facts: SizeFacts) -> float:
        """Between seeds of this kind: as far off as forecasts from its own settings were."""
        factor = math.exp(self._log_scale(facts, len(GROUPS)))
        return self.hyper.noise * min(max(factor, LEAST_NOISE), 1 / LEAST_NOISE)

    def _widened(self, facts: SizeFacts, mean: float, spread: float, situation: int) -> LogRatio:
        width = max(spread * math.exp(self._log_scale(facts, situation)), LEAST_SPREAD)
        return LogRatio(mean, width, self.hyper.dof, situation)

    def _log_scale(self, facts: SizeFacts, situation: int) -> float:
        log_scale = self.hyper.log_scales[situation]
        for key, weight in zip(_scale_keys(facts, situation), SHRINK, strict=True):
            log_scale = self._scales.get(key, _Scale()).shrunk(log_scale, weight)
        return log_scale

    def _posterior(self, facts: SizeFacts) -> tuple[float, float, int]:
        """Mean and spread of the next artifact's log ratio, and the situation."""
        hyper, asked = self.hyper, SizeTable.of([facts], dict(self._codes))
        own = kernel(hyper, asked, asked)[0, 0] + hyper.noise**2
        cross_N = kernel(hyper, asked, self._table)[0]
        if not len(cross_N):
            return hyper.mean, math.sqrt(own), 0
        near = np.sort(np.argsort(-cross_N, kind="stable")[:NEAREST])
        table, cross_M = self._table.take(near), cross_N[near]
        covariance_MM = kernel(hyper, table, table) + np.diag(self._noise_N[near])
        solved_M2 = np.linalg.solve(
            covariance_MM, np.stack([self._ratios_N[near] - hyper.mean, cross_M], axis=1)
        )
        mean = hyper.mean + float(cross_M @ solved_M2[:, 0])
        variance = max(float(own - cross_M @ solved_M2[:, 1]), hyper.noise**2)
        shared = (table.groups_NG == asked.groups_NG).any(axis=0)
        situation = max((level + 1 for level in range(len(GROUPS)) if shared[level]), default=0)
        return mean, math.sqrt(variance), situation


def _scale_keys(facts: SizeFacts, situation: int) -> list[tuple[int | str | None, ...]]:
    way, line = facts.groups[GROUPS.index("way")], facts.groups[GROUPS.index("line")]
    return [(situation,), (situation, way), (situation, way, line)]


def _mean_log(dof: float) -> float:
    """Mean of log |t| for Student's t."""
    return 0.5 * (math.log(dof) + float(digamma(0.5)) - float(digamma(dof / 2)))
