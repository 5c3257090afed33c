"""One run of benchmarks/cold_start.py in a process of its own: trains a few steps and says where
the seconds before the first of them went.

    python -m benchmarks.cold_start_child --recipe tiny --data DIR --submitted UNIX_SECONDS
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.compile_cache import use_compile_cache
from trainer.config import parse_overrides
from trainer.recipes import RECIPES

STARTED = time.time()


def main() -> None:
    """Train until enough steps are counted, then write the figures to --out."""
    arguments = _arguments()
    config = RECIPES[arguments.recipe].build()
    config = config.with_overrides(parse_overrides(arguments.set) | {"runtime.log_every": 1})
    use_compile_cache(config.runtime.compile_cache)
    import torch
    from torch._dynamo.utils import (
        counters,
        get_compilation_metrics,
        set_compilation_metrics_limit,
    )

    from trainer.loop import train

    imported = time.time()
    set_compilation_metrics_limit(4096)
    reporter = Stopwatch(arguments.steps)
    result = train(config, reporter)
    graphs = [describe_graph(metrics) for metrics in get_compilation_metrics()]
    figures = {
        "seconds": {
            "python": STARTED - arguments.submitted,
            "imports": imported - STARTED,
            **result.phases,
            "to_first_step": reporter.times["step"] - arguments.submitted,
        },
        "compile_seconds": add_up(graphs),
        "graphs": graphs,
        "caches": cache_counts({name: dict(counts) for name, counts in counters.items()}),
        "compilations_inside_the_clock": result.compilations,
        "losses": reporter.losses,
        "step_ms": result.step_ms,
        "log": reporter.lines,
        "threads": torch.get_num_threads(),
    }
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--submitted", type=float, default=STARTED, help="unix time")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Stopwatch:
    """A reporter that notes when a kind of record first came, and asks for a stop."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.times: dict[str, float] = {}
        self.losses: list[float] = []
        self.lines: list[str] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.times.setdefault(kind, time.time())
        if kind == "step":
            self.losses.append(fields["train_loss"])
        elif kind == "log":
            self.lines.append(fields["line"])
            print(fields["line"], file=sys.stderr, flush=True)

    def stop_requested(self) -> str | None:
        return "enough steps" if len(self.losses) >= self._num_steps else None


def describe_graph(metrics: Any) -> dict[str, Any]:
    """Seconds of one compilation by part; a backward pass that is put off is one of its own."""

    def seconds(name: str) -> float:
        return (getattr(metrics, name, None) or 0) / 1e6

    whole = seconds("duration_us")
    aot = seconds("aot_autograd_cumulative_compile_time_us")
    inductor = seconds("inductor_cumulative_compile_time_us")
    if metrics.is_forward is False:
        aot = inductor
    return {
        "name": f"{metrics.co_name} {metrics.compile_id}",
        "is_forward": metrics.is_forward is not False,
        "operators": metrics.graph_op_count,
        "all": whole,
        "dynamo": whole - aot,
        "aot": max(0.0, aot - inductor),
        "inductor": inductor,
        "of_which_codegen": seconds("inductor_code_gen_cumulative_compile_time_us"),
        "of_which_triton": seconds("triton_compile_time_us"),
        "autotune": seconds("runtime_triton_autotune_time_us")
        + seconds("compile_time_autotune_time_us"),
        "why": metrics.recompile_reason,
    }


PARTS = ("all", "dynamo", "aot", "inductor", "of_which_codegen", "of_which_triton", "autotune")


def add_up(graphs: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of every part over all graphs."""
    graphs = list(graphs)
    return {part: sum(graph[part] for graph in graphs) for part in PARTS}


def cache_counts(counters: dict[str, dict[str, int]]) -> dict[str, int]:
    """Hits, misses and bypasses of the compiler's caches."""
    return {
        name: count
        for group in ("inductor", "aot_autograd", "dynamo_cache")
        for name, count in sorted(counters.get(group, {}).items())
        if "cache" in name
    }


if __name__ == "__main__":
    main()
