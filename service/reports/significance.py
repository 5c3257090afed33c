"""Is one configuration better than another? Welch's test, looked at as the seeds come in.

Looking after every pair of seeds and stopping at the first good p would multiply false records, so
the error is spent: after n of N pairs the looks so far may have used alpha * (n / N) ** 3 of it
(error spending of Lan and DeMets, Biometrika 70, 1983; the power family of Kim and DeMets,
Biometrika 74, 1987). Each look gets what is new as its level of its own. Boole's inequality then
bounds the false records by alpha, whatever the looks have in common and however they are stopped.
What remains approximate is Welch's p itself: tests/service_tests/test_significance.py simulates it.

Futility ends a test by stochastic curtailment (Lan, Simon and Halperin, Communications in
Statistics C 1, 1982): never a false record, at worst a missed one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SPENDING_POWER = 3.0
"""Early looks get little: after 2 of 5 pairs 6 % of alpha is spent."""
MIN_PER_SIDE = 2
"""A deviation needs two values."""
FUTILE_BELOW = 0.05
"""Chance of still meeting the rule, if things go on as they went, below which a test is given up.
"""


@dataclass(frozen=True)
class RecordRule:
    """What makes a result a record."""

    margin_nats: float
    """By how much the mean loss must be lower, in nats per token."""
    alpha: float
    """One-sided p, of the hypothesis that it is not lower by that much, that is not reached."""


STRICT = RecordRule(margin_nats=0.005, alpha=0.01)
"""The challenge's README: 0.005 nats, shown at p < 0.01."""
LOOSE = RecordRule(margin_nats=0.0, alpha=0.25)
"""The table of the challenge was last rebuilt by a one-sided Welch test at p < 0.25."""


@dataclass(frozen=True)
class Welch:
    """Two samples compared."""

    margin: float
    """Mean of the incumbent minus mean of the candidate: positive = the candidate is better."""
    standard_error: float
    degrees: float
    """Of freedom, by Welch and Satterthwaite; not a whole number."""

    def p_value(self, margin: float = 0.0) -> float:
        """One-sided p of the hypothesis that the candidate is better by `margin` at most."""
        from scipy.special import stdtr  # as scipy.stats.t, at a fraction of its time

        if self.standard_error == 0.0:  # equal values: no noise to be fooled by
            return 0.0 if self.margin > margin else 1.0
        return float(stdtr(self.degrees, (margin - self.margin) / self.standard_error))

    def interval(self, share: float = 0.95) -> list[float]:
        """Two-sided confidence interval of the margin."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees, 0.5 + share / 2)) * self.standard_error
        return [self.margin - half, self.margin + half]


def welch(candidate: Sequence[float], incumbent: Sequence[float]) -> Welch | None:
    """Compare losses, lower is better; None below two values a side.

    B. L. Welch, The generalization of "Student's" problem, Biometrika 34, 1947.
    """
    if min(len(candidate), len(incumbent)) < MIN_PER_SIDE:
        return None
    ours = statistics.variance(candidate) / len(candidate)
    theirs = statistics.variance(incumbent) / len(incumbent)
    margin = statistics.fmean(incumbent) - statistics.fmean(candidate)
    both = ours + theirs
    if both == 0.0:
        return Welch(margin, 0.0, float(len(candidate) + len(incumbent) - 2))
    # In shares of the sum: squares of tiny variances would vanish.
    spread = (ours / both) ** 2 / (len(candidate) - 1) + (theirs / both) ** 2 / (len(incumbent) - 1)
    return Welch(margin, math.sqrt(both), 1 / spread)


@dataclass(frozen=True)
class Look:
    """A test after so many pairs of seeds."""

    num_pairs: int
    p_value: float
    """Of the rule's margin."""
    level: float
    """The p that this look must stay below."""
    holds: bool
    """Whether the rule is met, at this look or at an earlier one."""
    chance: float
    """Of meeting the rule with the remaining pairs, if the trend goes on."""


def levels(alpha: float, num_pairs: int, fixed: bool = False) -> dict[int, float]:
    """Pairs done -> level of that look; the levels add up to alpha.

    Args:
        alpha: The error to spend.
        num_pairs: Pairs planned, at least two.
        fixed: One look at the end gets all of it.
    """
    if fixed:
        return {num_pairs: alpha}
    looks = range(MIN_PER_SIDE, num_pairs + 1)
    spent = {n: alpha * (n / num_pairs) ** SPENDING_POWER for n in looks}
    return {n: spent[n] - spent.get(n - 1, 0.0) for n in looks}


def look(
    candidate: Sequence[float],
    incumbent: Sequence[float],
    num_pairs: int,
    rule: RecordRule,
    fixed: bool = False,
) -> Look | None:
    """All looks at the pairs so far, taken in order; None before the first.

    Args:
        candidate: Losses in nats per token, in the order of the pairs.
        incumbent: As many, or one more: only whole pairs count.
        num_pairs: How many pairs are planned.
        rule: What is tested.
        fixed: Look once, at the end.
    """
    allowed = levels(rule.alpha, num_pairs, fixed)
    latest, holds = None, False
    for n in range(MIN_PER_SIDE, min(len(candidate), len(incumbent), num_pairs) + 1):
        test = welch(candidate[:n], incumbent[:n])
        assert test is not None
        p_value, level = test.p_value(rule.margin_nats), allowed.get(n, 0.0)
        holds = holds or p_value < level
        chance = 1.0 if holds else _chance(p_value, n, num_pairs, allowed[num_pairs])
        latest = Look(n, p_value, level, holds, chance)
    return latest


def _chance(p_value: float, n: int, num_pairs: int, last_level: float) -> float:
    """Conditional power under the current trend, as a Brownian motion with drift would have it."""
    from scipy.special import ndtr, ndtri

    if n == num_pairs:
        return 0.0
    share = n / num_pairs
    z = -float(ndtri(min(max(p_value, 1e-300), 1 - 1e-16)))
    expected = z * math.sqrt(share) + z / math.sqrt(share) * (1 - share)
    missing = -float(ndtri(last_level)) - expected
    return float(ndtr(-missing / math.sqrt(1 - share)))
