"""Which configuration is best and fits: feasible trials, grouped by configuration, best first.

Trials that differ in their seed alone are one row. One seed proves nothing, so a row of one trial
has no interval; from two seeds on it has a 95 % confidence interval of the mean (Student's t).
The order is by the expected score: the mean, shrunk by what is known of seed noise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from service.reports.seed_noise import SeedNoise, seed_noise, shrink
from service.reports.study_view import TrialView
from service.study import SEED_PATH


@dataclass(frozen=True)
class Row:
    """One configuration."""

    rank: int
    numbers: list[int]
    """Its trials, best first."""
    params: dict[str, Any]
    """What the sampler chose."""
    overrides: dict[str, Any]
    """What differs from the recipe, the seed aside."""
    seeds: list[int | None]
    n: int
    mean: float
    """Bits per byte."""
    expected: float
    """Bits per byte that a new seed should give: the mean, shrunk towards the table's middle."""
    interval: list[float] | None
    """95 % confidence interval of the mean; None for one seed."""
    bytes_total: int | None
    """Of the largest artifact among the seeds."""
    bytes_left: int | None
    train_seconds: float | None
    """Of the slowest run among the seeds."""
    eval_seconds: float | None
    steps: int | None


def leaderboard(trials: Iterable[TrialView], artifact_bytes: int | None) -> list[Row]:
    """Rank the feasible, measured trials.

    Args:
        artifact_bytes: The cap that bytes_left is counted from; None = no cap.
    """
    groups = _groups(trials)
    means = [statistics.fmean(_values(group)) for group in groups]
    noise = seed_noise([_values(group) for group in groups])
    expected = shrink(means, [len(group) for group in groups], noise)
    ordered = sorted(zip(expected, means, groups, strict=True), key=lambda each: each[:2])
    return [
        _row(rank, group, artifact_bytes, value)
        for rank, (value, _, group) in enumerate(ordered, start=1)
    ]


def noise_of(trials: Iterable[TrialView]) -> SeedNoise:
    """The seed noise that the leaderboard of these trials is shrunk by."""
    return seed_noise([_values(group) for group in _groups(trials)])


def _groups(trials: Iterable[TrialView]) -> list[list[TrialView]]:
    """The feasible, measured trials of each configuration."""
    groups: dict[str, list[TrialView]] = {}
    for trial in trials:
        if trial.duplicate_of is not None:  # not another run: it would count one seed twice
            continue
        if trial.is_feasible and trial.value is not None and math.isfinite(trial.value):
            groups.setdefault(_configuration(trial), []).append(trial)
    return list(groups.values())


def as_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """The contract's list; `number` names the best trial of each row."""
    return [{"number": row.numbers[0], **asdict(row)} for row in rows]


def mean_interval(values: list[float]) -> list[float] | None:
    """95 % confidence interval of the mean under a normal distribution; None below two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [mean - half, mean + half]


def _row(rank: int, group: list[TrialView], artifact_bytes: int | None, expected: float) -> Row:
    group = sorted(group, key=lambda trial: (trial.value, trial.number))
    results = [trial.result for trial in group if trial.result is not None]
    sizes = [result.bytes_total for result in results if result.bytes_total is not None]
    bytes_total = max(sizes, default=None)
    values = _values(group)
    overrides = {path: v for path, v in group[0].overrides.items() if path != SEED_PATH}
    return Row(
        rank=rank,
        numbers=[trial.number for trial in group],
        params={path: v for path, v in group[0].params.items() if path != SEED_PATH},
        overrides=overrides,
        seeds=[trial.seed for trial in group],
        n=len(group),
        mean=statistics.fmean(values),
        expected=expected,
        interval=mean_interval(values),
        bytes_total=bytes_total,
        bytes_left=None
        if bytes_total is None or artifact_bytes is None
        else artifact_bytes - bytes_total,
        train_seconds=max((r.phases.get("train", 0.0) for r in results), default=None),
        eval_seconds=max((r.phases.get("evaluate", 0.0) for r in results), default=None),
        steps=min((result.steps for result in results), default=None),
    )


def _values(group: list[TrialView]) -> list[float]:
    return [trial.value for trial in group if trial.value is not None]


def _configuration(trial: TrialView) -> str:
    """As the digest: neither the seed nor where data lies makes another configuration."""
    unlike = (SEED_PATH, "data.dir")
    rest = {path: value for path, value in trial.overrides.items() if path not in unlike}
    return json.dumps(rest, sort_keys=True)
