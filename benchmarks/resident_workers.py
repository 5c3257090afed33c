"""The gap between two trials on a gang: one TorchTrainer per trial against one that stays, one
after the other on one cluster, with the recipe tiny.

    python -m benchmarks.resident_workers --trials 5 --workers 2

The clock of a gap runs in the workers: from the end of `train()` of one trial on rank 0 to the
beginning of the next, and to its first step (which priming comes before). The driver looks as often
as `caddie sweep run` does; what the scheduler itself takes for asking and telling is not in it. The
first trial of either kind has no gap and is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from service.commands.sweep_driver import TURN_S
from service.runners.base import Demand, RunState
from service.runners.gang_pool import Isolation
from service.runners.ray_cluster import connect
from service.runners.ray_runner import RayRunner
from service.trial import TrialSpec
from trainer.config import TrainConfig
from trainer.data.demo_corpus import build_demo
from trainer.loop import train as train_for_real
from trainer.recipes.tiny import tiny
from trainer.report import Reporter, TrainResult

KINDS: tuple[Isolation, ...] = ("trial", "resident")


def train(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """The real one, saying when it begins and ends."""
    reporter.emit("log", line="begins")
    result = train_for_real(config, reporter, out)
    reporter.emit("log", line="ends")
    return result


def run_one(runner: RayRunner, spec: TrialSpec, demand: Demand) -> dict[str, float]:
    """Wait for room, run one trial; wall-clock seconds of its beginning, first step and end."""
    while runner.free_slots(demand) < 1:
        time.sleep(TURN_S)
    runner.submit(spec, demand)
    times: dict[str, float] = {}
    while True:
        update = runner.poll(spec.number)
        for event in update.events:
            if event["kind"] == "log" and event["line"] in ("begins", "ends"):
                times[event["line"]] = event["time"]
            elif event["kind"] == "step" and "stepped" not in times:
                times["stepped"] = event["time"] - event["elapsed_s"]
        if update.state is RunState.FINISHED:
            return times
        if update.error is not None:
            raise SystemExit(f"trial {spec.key} failed: {update.error}")
        time.sleep(TURN_S)


def gaps(times: list[dict[str, float]], to: str) -> list[float]:
    """Seconds from each trial's end to a moment of the next."""
    return [after[to] - before["ends"] for before, after in itertools.pairwise(times)]


def spec_of(folder: Path, number: int, data: Path, steps: int) -> TrialSpec:
    changes: dict[str, Any] = {
        "data.dir": str(data),
        "budget.train_seconds": None,
        "budget.max_steps": steps,
        "schedule.progress": "steps",
        "runtime.seed": number,
    }
    path = folder / str(number)
    path.mkdir(parents=True)
    return TrialSpec("benchmark", number, "tiny", changes, tiny().with_overrides(changes), path)


def measure(trials: int, workers: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Times of so many trials of either kind."""
    demand = Demand(workers=workers)
    name = "benchmarks.resident_workers:train"
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data")
        build_demo(data)
        cluster = connect(num_cpus=workers)
        try:
            for kind in KINDS:
                runner = RayRunner(train=name, isolation=kind)
                try:
                    for number in range(trials):
                        spec = spec_of(Path(scratch, kind), number, data, steps)
                        times[kind].append(run_one(runner, spec, demand))
                        said = [f"{gap:.2f} s" for gap in gaps(times[kind][-2:], "begins")]
                        print(kind, number, *said, flush=True)
                finally:
                    runner.close()
        finally:
            cluster.disconnect()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trials", type=int, default=5, help="of either kind; one less gaps")
    parser.add_argument("--workers", type=int, default=2, help="of a trial")
    parser.add_argument("--steps", type=int, default=20, help="of a trial")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    times = measure(args.trials, args.workers, args.steps)
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.resident_workers --trials {args.trials} "
        f"--workers {args.workers} --steps {args.steps}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg()[0],
    }
    for to, words in (("begins", "start of train()"), ("stepped", "first step")):
        seconds = {kind: gaps(times[kind], to) for kind in KINDS}
        medians = {kind: statistics.median(seconds[kind]) for kind in KINDS}
        found[f"seconds_to_{to}"] = seconds
        found[f"ratio_to_{to}"] = medians["trial"] / medians["resident"]
        for kind in KINDS:
            most = max(seconds[kind])
            print(f"end to {words}, {kind}: median {medians[kind]:.2f} s, at most {most:.2f} s")
        print(f"end to {words}: {found[f'ratio_to_{to}']:.1f} times as long without residents")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
