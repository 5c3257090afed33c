"""Replays the public runs in time order: how well are artifact sizes forecast before training?

    python -m benchmarks.artifact_sizes --runs FOLDER --out benchmarks/results/artifact_sizes.json

Each run is forecast from what was committed before it, then learned. The numbers of the model are
those of the shipped prior, fitted on runs before benchmarks.size_prior.FIT_BEFORE; only later runs
are judged. The prior's anchors, medians of runs of all dates, are not read. Two orders: "run by
run", as a study learns, where seeds of one commit follow each other; and "day by day", where
nothing of the run's own day is known. Prints the table and writes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.public_sizes import PublicSize, read_public_sizes
from benchmarks.size_prior import FIT_BEFORE
from service.config import ServiceSettings
from service.filters.size_model import LogRatio, SizeModel
from service.filters.size_prior import PRIOR_FILE, read_prior

CAP = 16_000_000
COMMAND = "python -m benchmarks.artifact_sizes --runs FOLDER --out FILE"
AFTER = 20
"""Artifacts of a recipe family that make a forecast warm."""
LIMITS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Judged:
    """A forecast and what came of it."""

    size: PublicSize
    forecast: LogRatio
    before_in_family: int
    """Artifacts of the recipe family that were known."""
    before_in_script: int
    before_in_settings: int

    @property
    def error(self) -> float:
        """Share by which the median of the forecast was off, of all bytes."""
        return abs(self.bytes_at(0.5) / self.size.total - 1)

    def bytes_at(self, probability: float) -> float:
        ratio = math.exp(self.forecast.quantile(probability))
        return self.size.bytes_code + self.size.reckoned * ratio

    @property
    def inside(self) -> bool:
        return self.bytes_at(0.05) <= self.size.total <= self.bytes_at(0.95)

    @property
    def probability_over(self) -> float:
        room = max(CAP - self.size.bytes_code, 1) / self.size.reckoned
        return self.forecast.above(math.log(room))


def main() -> None:
    """Replay in both orders, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the public runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prior", type=Path, default=PRIOR_FILE)
    arguments = parser.parse_args()
    sizes = read_public_sizes(arguments.runs)
    hyper = read_prior(arguments.prior).hyper
    record: dict[str, Any] = {"command": COMMAND, "fitted_before": FIT_BEFORE, "rows": []}
    for order, batches in (("run by run", [[s] for s in sizes]), ("day by day", _days(sizes))):
        judged = replay(SizeModel(hyper), batches)
        late = [one for one in judged if one.size.date >= FIT_BEFORE]
        record["rows"] += [{"order": order, **row} for row in table(late)]
    print_table(record["rows"])
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _days(sizes: Sequence[PublicSize]) -> list[list[PublicSize]]:
    return [list(day) for _, day in itertools.groupby(sizes, key=lambda size: size.date)]


def replay(model: SizeModel, batches: Sequence[Sequence[PublicSize]]) -> list[Judged]:
    """Forecast every run of a batch, then learn the batch."""
    judged: list[Judged] = []
    families: Counter[Any] = Counter()
    for batch in batches:
        if len(batch) > 1:
            forecasts = [model.predict(size.facts) for size in batch]
            for size in batch:
                model.learn(size.facts, size.log_ratio)
        else:
            forecasts = [model.learn(size.facts, size.log_ratio) for size in batch]
        for size, forecast in zip(batch, forecasts, strict=True):
            known = (families[key] for key in _families(size))
            judged.append(Judged(size, forecast, *known))
        families.update(key for size in batch for key in _families(size))
    return judged


def _families(size: PublicSize) -> Iterator[Any]:
    yield "family", size.family
    yield "script", size.facts.groups[3]
    yield "settings", size.facts.groups[4]


POPULATIONS: dict[str, Callable[[Judged], bool]] = {
    "record track": lambda one: one.size.in_record_track,
    "all runs": lambda one: True,
}
SITUATIONS: dict[str, Callable[[Judged], bool]] = {
    "any": lambda one: True,
    "first of its script": lambda one: one.before_in_script == 0,
    "first of its family": lambda one: one.before_in_family == 0,
    "first of its settings": lambda one: one.before_in_settings == 0,
    f"after {AFTER} of its family": lambda one: one.before_in_family >= AFTER,
}


def table(judged: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """A row for each population and situation."""
    limits = sorted({*LIMITS, ServiceSettings().size_limit})
    for population, of_population in POPULATIONS.items():
        for situation, of_situation in SITUATIONS.items():
            chosen = [one for one in judged if of_population(one) and of_situation(one)]
            if not chosen:
                continue
            errors = np.array([one.error for one in chosen])
            over = np.array([one.size.total > CAP for one in chosen])
            odds = np.array([one.probability_over for one in chosen])
            widths = [(one.bytes_at(0.95) - one.bytes_at(0.05)) / one.size.total for one in chosen]
            yield {
                "population": population,
                "situation": situation,
                "runs": len(chosen),
                "median_error_percent": round(100 * float(np.median(errors)), 4),
                "p90_error_percent": round(100 * float(np.quantile(errors, 0.9)), 3),
                "inside_90": round(float(np.mean([one.inside for one in chosen])), 4),
                "median_width_percent": round(100 * float(np.median(widths)), 3),
                "over_cap": int(over.sum()),
                "at_limit": {
                    str(limit): {
                        "caught": _share(odds[over] > limit),
                        "refused": _share(odds[~over] > limit),
                    }
                    for limit in limits
                },
            }


def _share(hits: np.ndarray) -> float | None:
    return round(float(hits.mean()), 4) if len(hits) else None


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """As in docs/artifact_size.md."""
    limit = str(ServiceSettings().size_limit)
    print(f"caught and refused at the default limit, {limit}")
    print(
        "| order | runs | situation | n | median error | p90 | inside 90 % "
        "| over | caught | refused |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        at = row["at_limit"][limit]
        print(
            f"| {row['order']} | {row['population']} | {row['situation']} | {row['runs']} "
            f"| {row['median_error_percent']:.3f} % | {row['p90_error_percent']:.2f} % "
            f"| {row['inside_90']:.1%} | {row['over_cap']} "
            f"| {_percent(at['caught'])} | {_percent(at['refused'])} |"
        )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()
