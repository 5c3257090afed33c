"""One recipe of `python -m benchmarks`, in a process of its own: trains for some seconds, by its
own schedule over that time, and writes what its steps took, phase of the schedule by phase.

FLOPs of a training token, forward and backward: 6 per weight that multiplies it, a block's counted
once per visit, and 12 width keys per layer of attention, keys being the mean that a causal query
meets within window and row (trainer.account.flops_per_token). Nothing is counted for recomputation,
the optimiser, norms or the embedding's lookup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.account import count_parameters, flops_per_token
from trainer.compile_cache import use_compile_cache
from trainer.config import TrainConfig, parse_overrides
from trainer.config.recurrence import visits_at
from trainer.mix import lanes_of
from trainer.recipes import RECIPES

SHARE = 0.7
"""Of a run's schedule that is measured: every phase has begun, and the end stays out of reach."""
UNSTEADY_STEPS = 3
"""First steps of a phase that are left out: the host runs ahead, caches fill."""


def main() -> None:
    """Train, then write the figures to --out."""
    arguments = _arguments()
    config = config_of(arguments.recipe, arguments.set, arguments.seconds)
    use_compile_cache(config.runtime.compile_cache)
    import torch

    from benchmarks.rooflines import measure_rooflines
    from trainer.loop import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_rooflines(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    watch = StepWatch(arguments.seconds)
    result = train(config, watch)
    figures = {
        "phases": [describe_phase(config, phase, ceilings) for phase in watch.by_phase(config)],
        "seconds": result.phases,
        "steps": result.steps,
        "peak_memory_bytes": result.peak_memory_bytes,
        "num_params": result.num_params,
        "compilations_inside_the_clock": result.compilations,
        "rooflines": ceilings,
        "log": watch.lines,
    }
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def config_of(recipe: str, pairs: Sequence[str], seconds: float) -> TrainConfig:
    """The recipe, so that `seconds` are the first SHARE of its training; settings given win."""
    config = RECIPES[recipe].build()
    reserve = config.quantize.reserve_seconds if config.quantize.method == "gptq" else 0.0
    chosen: dict[str, Any] = {
        "budget.train_seconds": seconds / SHARE + reserve,
        "budget.max_steps": None,
        "schedule.progress": "clock",
        "runtime.log_every": 1,
        "runtime.val_every": 0,
        "runtime.prime_score": "after",  # which a run that is stopped never gets to
    }
    return config.with_overrides(chosen | parse_overrides(list(pairs)))


class StepWatch:
    """A reporter that keeps the milliseconds of every step, and stops the run in time, so that
    nothing is calibrated, packed or scored."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._elapsed = 0.0
        self.steps: list[tuple[float, float]] = []
        """Progress before a step, and its milliseconds."""
        self.lines: list[str] = []
        self._progress = 0.0

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "step":
            self.steps.append((self._progress, fields["step_ms"]))
            self._progress, self._elapsed = fields["progress"], fields["elapsed_s"]
        elif kind == "log":
            self.lines.append(fields["line"])
            print(fields["line"], file=sys.stderr, flush=True)

    def stop_requested(self) -> str | None:
        return "measured" if self._elapsed >= self._seconds else None

    def by_phase(self, config: TrainConfig) -> list[tuple[float, list[float]]]:
        """Steps by the start of the phase of the schedule that they belong to, without the first
        few of each and the one at a border, which may belong to either."""
        from trainer.priming import phase_starts

        starts = phase_starts(config)
        phases = []
        for start, end in zip(starts, [*starts[1:], 2.0], strict=True):
            own = [ms for progress, ms in self.steps if start <= progress < end]
            phases.append((start, own[min(UNSTEADY_STEPS, len(own) - 1) :]))
        return [(start, steps) for start, steps in phases if steps]


def describe_phase(
    config: TrainConfig, phase: tuple[float, list[float]], ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Median step, tokens a second, and shares of the ceilings, in one phase of the schedule."""
    start, steps = phase
    step_s = statistics.median(steps) / 1000
    tokens = config.data.batch_tokens
    flops = tokens * flops_per_step_token(config, start)
    # Every weight of the fp32 master, its gradient and two moments is read and written once.
    optimizer_bytes = 2 * 4 * 4 * count_parameters(config.model)
    return {
        "from": start,
        "steps": len(steps),
        "step_ms": 1000 * step_s,
        "step_ms_p90": sorted(steps)[int(0.9 * (len(steps) - 1))],
        "tokens_per_s": tokens / step_s,
        "flops_per_token": flops / tokens,
        "model_flops_utilisation": flops / step_s / ceilings["matrix_flops"],
        "floor_ms_of_products": 1000 * flops / ceilings["matrix_flops"],
        "floor_ms_of_optimizer_traffic": 1000 * optimizer_bytes / ceilings["copy_bytes"],
    }


def flops_per_step_token(config: TrainConfig, progress: float) -> float:
    """Of a token of a step at this progress: with the visits of then, over rows of all lengths."""
    visits = min(visits_at(config.recur_phases, progress), config.model.recur_visits)
    model = config.model.model_copy(update={"recur_visits": visits})
    if not config.data.mix:
        return flops_per_token(model, config.data.seq_len)
    lanes = lanes_of(config.data)
    total = sum(lane.num_tokens * flops_per_token(model, lane.seq_len) for lane in lanes)
    return total / sum(lane.num_tokens for lane in lanes)


if __name__ == "__main__":
    main()
