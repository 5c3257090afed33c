"""Distils the public runs into service/filters/size_prior.json, what size forecasts start from.

    python -m benchmarks.size_prior --runs FOLDER

The numbers of the model (how alike artifacts of one group are, how fast likeness falls) are fitted
on runs committed before FIT_BEFORE alone, so that benchmarks/artifact_sizes.py judges the very
numbers that ship on runs that they never saw. They maximise the likelihood of each of those runs
given the ones before it, which one Cholesky factor holds; Student's t, because sizes have outliers.
`steady` is set by hand: an entropy argument, which no run before FIT_BEFORE could teach. Anchors,
medians of like artifacts, are of all runs: what they forecast is yet to come. The replay does not
read them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import gammaln

from benchmarks.public_sizes import PublicSize, read_public_sizes
from service.commands.recipe_config import configured
from service.filters.size_facts import reckoned_bytes, size_facts
from service.filters.size_model import (
    GROUPS,
    NUMBERS,
    SizeFacts,
    SizeHyper,
    SizeModel,
    SizeTable,
    kernel,
)
from service.filters.size_prior import PRIOR_FILE, SizePrior, read_prior
from trainer.recipes import RECIPES

FIT_BEFORE = "2026-04-01"
DOF = 2.5
START = SizeHyper(
    mean=-0.1,
    group_spreads=(0.1, 0.1, 0.02, 0.01, 0.005),
    smooth_way=0.1,
    smooth_all=0.1,
    weights=(0.3, 0.1, 0.1, 0.1, 0.3, 0.2, 0.2, 0.1),
    steady=0.1,
    noise=0.002,
    dof=DOF,
    log_scales=(0.0,) * (len(GROUPS) + 1),
)
BURN_IN = 100
"""First runs of the fit, which nothing comes before."""
ANCHOR_RUNS = 2
LEAST_ANCHOR_SPREAD = 0.003
RECIPES_OF_PULLS = (675, 1212, 1894)
"""Pull requests that are recipes here, as pr675 and so on."""
RESULTS = Path(__file__).with_name("results")
Floats = NDArray[np.float64]


def main() -> None:
    """Fit, distil, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the public runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="measured by this project")
    parser.add_argument("--out", type=Path, default=PRIOR_FILE)
    parser.add_argument("--rounds", type=int, default=14, help="of the coordinate search")
    parser.add_argument("--keep", action="store_true", help="fit only widths, distil anchors anew")
    arguments = parser.parse_args()
    sizes = read_public_sizes(arguments.runs)
    early = [size for size in sizes if size.date < FIT_BEFORE]
    if arguments.keep:
        hyper = replace(read_prior(arguments.out).hyper, log_scales=START.log_scales)
    else:
        hyper = fitted(early, arguments.rounds)
    hyper = with_scales(hyper, early)
    known = (*anchors(sizes), *own_anchors(arguments.results))
    prior = SizePrior(hyper, known, f"runs before {FIT_BEFORE}")
    arguments.out.write_text(prior.to_json())
    print(f"{arguments.out}: {len(early)} runs fitted, {len(prior.anchors)} anchors")
    print(json.dumps(asdict(hyper), indent=1))


def fitted(sizes: Sequence[PublicSize], rounds: int) -> SizeHyper:
    """The numbers that make each run most likely given those before it."""
    ratios_N = np.array([size.log_ratio for size in sizes])
    table = SizeTable.of([size.facts for size in sizes], {})
    start = replace(START, mean=float(np.median(ratios_N)))
    vector, steps = _packed(start), np.full(len(_packed(start)), 0.7)

    def loss(candidate: Floats) -> float:
        return -_log_likelihood(_unpacked(candidate, start), table, ratios_N)

    best = loss(vector)
    for turn in range(rounds):
        for index in range(len(vector)):
            vector, best, steps[index] = _stepped(loss, vector, best, index, steps[index])
        print(f"round {turn + 1}: {-best:.4f} nats a run", flush=True)
    return _unpacked(vector, start)


def _stepped(
    loss: Callable[[Floats], float], vector: Floats, best: float, index: int, step: float
) -> tuple[Floats, float, float]:
    """One step up or down a coordinate where that helps, a shorter step where it does not."""
    for signed in (step, -step):
        moved = vector.copy()
        moved[index] += signed
        found = loss(moved)
        if found < best:
            return moved, found, step * 1.3
    return vector, best, step * 0.5


def _log_likelihood(hyper: SizeHyper, table: SizeTable, ratios_N: Floats) -> float:
    """Mean log density of each ratio given the earlier ones, as Student's t."""
    covariance_NN = kernel(hyper, table, table)
    covariance_NN[np.diag_indices(len(ratios_N))] += hyper.noise**2
    try:
        lower_NN = np.linalg.cholesky(covariance_NN)
    except np.linalg.LinAlgError:
        return -math.inf
    z_N = solve_triangular(lower_NN, ratios_N - hyper.mean, lower=True)
    dof = hyper.dof
    constant = gammaln((dof + 1) / 2) - gammaln(dof / 2) - 0.5 * math.log(dof * math.pi)
    tails_N = -(dof + 1) / 2 * np.log1p(z_N**2 / dof) - np.log(np.diag(lower_NN))
    return float(constant + tails_N[BURN_IN:].mean())


def _packed(hyper: SizeHyper) -> Floats:
    parts = (*hyper.group_spreads, hyper.smooth_way, hyper.smooth_all, *hyper.weights, hyper.noise)
    return np.log(parts)


def _unpacked(vector: Floats, base: SizeHyper) -> SizeHyper:
    values = [round(float(value), 8) for value in np.exp(vector)]
    spreads, rest = values[: len(GROUPS)], values[len(GROUPS) :]
    return replace(
        base,
        group_spreads=tuple(spreads),
        smooth_way=rest[0],
        smooth_all=rest[1],
        weights=tuple(rest[2 : 2 + len(NUMBERS)]),
        noise=rest[-1],
    )


def with_scales(hyper: SizeHyper, sizes: Sequence[PublicSize]) -> SizeHyper:
    """The same with the widths that forecasts of these runs needed, per situation."""
    model = SizeModel(hyper)
    for size in sizes:
        model.learn(size.facts, size.log_ratio)
    return replace(hyper, log_scales=tuple(round(scale, 4) for scale in model.log_scales()))


def anchors(sizes: Sequence[PublicSize]) -> Iterator[tuple[SizeFacts, float, float]]:
    """Medians of like artifacts of the record track, and of the lines that are recipes here."""
    like: dict[tuple[Any, ...], list[PublicSize]] = defaultdict(list)
    for size in (size for size in sizes if size.in_record_track):
        line = size.facts.groups[2] if size.row["pr"] in RECIPES_OF_PULLS else None
        rounded = tuple(None if n is None else round(n, 1) for n in size.facts.numbers)
        like[*size.facts.groups[:2], line, rounded].append(size)
    for (rule, way, line, numbers), members in like.items():
        if len(members) < ANCHOR_RUNS and line is None:
            continue
        ratios = [size.log_ratio for size in members]
        spread = max(statistics.pstdev(ratios), LEAST_ANCHOR_SPREAD)
        facts = SizeFacts((rule, way, line, None, None), numbers, members[0].facts.scale_free)
        yield facts, round(statistics.median(ratios), 5), round(spread, 5)


def own_anchors(results: Path) -> Iterator[tuple[SizeFacts, float, float]]:
    """Artifacts that benchmarks/training.py measured. Their settings are not among the facts: no
    user's run repeats them."""
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        recipe, runs = document["command"][1], document.get("runs", {})
        for run in runs.values() if recipe in RECIPES else ():
            size = run.get("result", {}).get("bytes_model")
            if size is None:
                continue
            config, _ = configured(recipe, run["overrides"])
            facts = size_facts(config, recipe, run["result"]["world_size"])
            facts = replace(facts, groups=(*facts.groups[:-1], None))
            ratio = math.log(size / reckoned_bytes(config))
            yield facts, round(ratio, 5), LEAST_ANCHOR_SPREAD


if __name__ == "__main__":
    main()
