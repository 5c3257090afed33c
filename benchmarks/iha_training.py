"""The whole runs of benchmarks/iha.py: every variant and seed, at equal time or at equal epochs.

Apart from it, because it starts processes and never touches a device itself.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks.training import run_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` takes beside variants, --set and --out."""
    parser.add_argument("--recipe", default="slowrun_gpu")
    parser.add_argument("--data", required=True)
    parser.add_argument("--equal", choices=("time", "epochs"), required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help='with "--equal time"')
    parser.add_argument("--steps", type=int, default=400, help='with "--equal epochs"')
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, a GPU each")


def train_variants(
    arguments: argparse.Namespace,
    variants: Mapping[str, Mapping[str, Any]],
    record: dict[str, Any],
) -> None:
    """Run all, write each row when it is there, and print what each variant came to."""
    gpus: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(arguments.parallel):
        gpus.put(gpu)

    def run(name: str, seed: int) -> dict[str, Any]:
        pairs = [f"{path}={value}" for path, value in variants[name].items()]
        pairs += [*limits(arguments), f"runtime.seed={seed}", *arguments.set]
        gpu = gpus.get()
        try:
            environment = _environment(gpu) if arguments.parallel > 1 else None
            done = run_recipe(arguments.recipe, arguments.data, pairs, environment=environment)
        finally:
            gpus.put(gpu)
        return {"variant": name, "seed": seed, **done}

    with ThreadPoolExecutor(arguments.parallel) as pool:
        waiting = [
            pool.submit(run, name, seed) for seed in arguments.seeds for name in arguments.variants
        ]
        for done in as_completed(waiting):
            record["rows"].append(done.result())
            record["summary"] = summarize(record["rows"])
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
            _print_row(record["rows"][-1])
    print(f"{'variant':20s} {'seeds':>5s} {'steps':>7s} {'ms':>8s} {'nats':>8s} {'+-':>7s}")
    for name, row in record["summary"].items():
        print(
            f"{name:20s} {row['seeds']:5d} {row['steps']:7.1f} {row['step_ms']:8.2f} "
            f"{row['val_loss']:8.4f} {row['val_loss_std']:7.4f}",
            flush=True,
        )


def limits(arguments: argparse.Namespace) -> list[str]:
    """Overrides that give every variant the same time, or the same steps and so epochs."""
    if arguments.equal == "time":
        return [f"budget.train_seconds={arguments.seconds}", "schedule.progress=clock"]
    return [
        "schedule.progress=steps",
        f"budget.max_steps={arguments.steps}",
        "budget.train_seconds=null",
    ]


def _environment(gpu: int) -> dict[str, str]:
    """Of one run among several: one of the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = visible.split(",")[gpu] if visible else str(gpu)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": device}


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the seeds of each variant; failed runs are left out."""
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["variant"] for row in rows if "result" in row):
        results = [row["result"] for row in rows if row["variant"] == name and "result" in row]
        losses = [result["val_loss"] for result in results]
        summary[name] = {
            "seeds": len(results),
            "val_loss": statistics.fmean(losses),
            "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "val_bpb": statistics.fmean(result["val_bpb"] for result in results),
            "steps": statistics.fmean(result["steps"] for result in results),
            "tokens": statistics.fmean(result["tokens"] for result in results),
            "step_ms": statistics.fmean(result["step_ms"] for result in results),
            "ensemble": {
                mode: statistics.fmean(result["ensemble"][mode] for result in results)
                for mode in results[0]["ensemble"]
            },
        }
    return summary


def _print_row(row: dict[str, Any]) -> None:
    title = f"{row['variant']}, seed {row['seed']}"
    if "result" not in row:
        print(f"{title:30s} failed with exit code {row['exit_code']}", flush=True)
        return
    result = row["result"]
    together = "  ".join(f"{mode} {nats:.4f}" for mode, nats in result["ensemble"].items())
    print(
        f"{title:30s} steps {result['steps']:5d}  {result['step_ms']:8.2f} ms  "
        f"nats {result['val_loss']:.4f}  {together}  "
        f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB",
        flush=True,
    )
