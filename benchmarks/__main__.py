"""Speed of every recipe on what is there: `python -m benchmarks`, one command.

    python -m benchmarks --seconds 30 --out benchmarks/results/DATE_bench_DEVICE.json
    python -m benchmarks --recipes pr1894 pr1212 --set runtime.attention=flash4
    python -m benchmarks --recipes tiny --seconds 2

Each recipe is a process of its own and runs at its own batch and rows. Per phase of its schedule:
median step, tokens a second, model FLOPs utilisation as a share of a matrix product measured in the
same process (benchmarks/throughput.py states the formula), and how long the step would take if it
were only its products, or only the optimiser's traffic. Then memory and seconds by phase of a run.
Tokens are random unless --data is given; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.random_data import write_random_data
from benchmarks.throughput import config_of
from benchmarks.training import machine
from trainer.recipes import RECIPES

DEFAULT = ("golf_baseline", "pr675", "pr1212", "pr1894", "frontier")


def main() -> int:
    """Measure, print and write; 1 when a recipe failed."""
    arguments = _arguments()
    record: dict[str, Any] = {"command": sys.argv, **machine(), "seconds": arguments.seconds}
    record["recipes"] = {}
    for recipe in arguments.recipes:
        row = run_recipe(recipe, arguments)
        record["recipes"][recipe] = row
        _show(recipe, row)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("failed" in row for row in record["recipes"].values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), default=DEFAULT)
    parser.add_argument("--seconds", type=float, default=30.0, help="of training steps, each")
    parser.add_argument("--data", help="data folder for all of them; default: random tokens")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one, in all")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run_recipe(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one recipe, or why there are none."""
    config = config_of(recipe, arguments.set, arguments.seconds)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        data = arguments.data
        if data is None:
            train_tokens = 4 * config.data.batch_tokens + config.quantize.calibration_tokens + 1
            train_tokens = max(train_tokens, config.budget.train_tokens or 0)
            val_tokens = 4 * config.evaluate.seq_len + 1
            folder, vocab_size = Path(scratch) / "data", config.model.vocab_size
            data = str(write_random_data(folder, vocab_size, train_tokens, val_tokens))
        out = Path(scratch) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.throughput", "--recipe", recipe]
        command += ["--seconds", str(arguments.seconds), "--out", str(out)]
        for pair in [*arguments.set, f"data.dir={data}"]:
            command += ["--set", pair]
        try:
            done = subprocess.run(command, check=False, timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {arguments.limit:g} s"}
        if not out.exists():
            return {"failed": f"exit code {done.returncode}"}
        figures: dict[str, Any] = json.loads(out.read_text())
        return {"overrides": arguments.set, **figures}


def _show(recipe: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{recipe:16s} failed: {row['failed']}", flush=True)
        return
    ceilings = row["rooflines"]
    print(
        f"{recipe:16s} peak {row['peak_memory_bytes'] / 2**30:.1f} GiB, products at most "
        f"{ceilings['matrix_flops'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']}), copies "
        f"{ceilings['copy_bytes'] / 1e9:.3g} GB/s, seconds "
        f"{ {name: round(value, 1) for name, value in row['seconds'].items()} }"
    )
    for phase in row["phases"]:
        print(
            f"  from {phase['from']:.2f}: {phase['step_ms']:9.2f} ms (p90 "
            f"{phase['step_ms_p90']:.2f}, n {phase['steps']}) {phase['tokens_per_s']:12,.0f} "
            f"tokens/s  utilisation {phase['model_flops_utilisation']:.1%}  floors: products "
            f"{phase['floor_ms_of_products']:.2f} ms, optimiser "
            f"{phase['floor_ms_of_optimizer_traffic']:.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
