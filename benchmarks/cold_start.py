"""Seconds from submitting a trial to its first counted step, with an empty compile cache and with
the one that the first trial left.

    python -m benchmarks.cold_start --recipe pr1894 --steps 5 --out cold_start.json
    python -m benchmarks.cold_start --recipe tiny --set runtime.compile=on --run "whole:" \\
        --run "blocks: runtime.compile=blocks"

Each variant is two processes, one after the other: "cold" with an empty folder for everything that
the compiler keeps, "warm" with the same folder. Seconds of compilation are the compiler's own
figures: tracing Python (dynamo), differentiating and lowering (aot), writing and compiling kernels
(inductor, of which its code generation and Triton), autotuning. Hits and misses of its caches
are counted, and so is what was compiled inside the clock. Without --data the tokens are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cold_start_child import PARTS
from benchmarks.random_data import write_random_data
from benchmarks.training import machine
from trainer.config import TrainConfig, parse_overrides
from trainer.recipes import RECIPES

VAL_TOKENS = 1_000_000
SHOWN = ("python", "imports", "build", "prime", "to_first_step")


def main() -> None:
    """Measure every variant and write the figures."""
    arguments = _arguments()
    record: dict[str, Any] = {"command": sys.argv, **machine(), "recipe": arguments.recipe}
    record["runs"] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or str(_random_data(arguments, Path(scratch)))
        for variant in arguments.run or ["plain:"]:
            name, _, pairs = variant.partition(":")
            overrides = [f"data.dir={data}", "budget.train_seconds=600", *arguments.set]
            overrides += pairs.split()
            with tempfile.TemporaryDirectory(prefix="cold-start-") as cache:
                rows = {kind: _run(arguments, overrides, Path(cache)) for kind in ("cold", "warm")}
            record["runs"][name] = {"overrides": overrides, **rows}
            _show(name, rows)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", choices=sorted(RECIPES))
    parser.add_argument("--data", help="data folder; default: random tokens")
    parser.add_argument("--set", action="append", default=[], help="override for every variant")
    parser.add_argument("--run", action="append", default=[], help='"name: path=value ..."')
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each run")
    parser.add_argument("--seconds", type=float, default=500.0, help="longest run")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _random_data(arguments: argparse.Namespace, folder: Path) -> Path:
    config: TrainConfig = RECIPES[arguments.recipe].build()
    config = config.with_overrides(parse_overrides(arguments.set))
    train_tokens = 2 * config.data.batch_tokens + config.quantize.calibration_tokens + 1
    val_tokens = min(VAL_TOKENS, 64 * config.evaluate.seq_len) + 1
    return write_random_data(folder / "data", config.model.vocab_size, train_tokens, val_tokens)


def _run(arguments: argparse.Namespace, overrides: list[str], cache: Path) -> dict[str, Any]:
    """The figures of a run in a process of its own, or its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.cold_start_child", "--recipe"]
        command += [arguments.recipe, "--steps", str(arguments.steps), "--out", str(out)]
        for pair in [*overrides, f"runtime.compile_cache={cache}"]:
            command += ["--set", pair]
        command += ["--submitted", repr(time.time())]
        try:
            done = subprocess.run(command, check=False, timeout=arguments.seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {arguments.seconds:g} s"}
        if not out.exists():
            return {"failed": f"exit code {done.returncode}"}
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        return {**json.loads(out.read_text()), "cache_bytes": size}


def _show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Both runs side by side, on standard output."""
    print(f"{name:34s} " + "".join(f"{kind:>12s}" for kind in rows))
    failed = [f"{kind}: {row['failed']}" for kind, row in rows.items() if "failed" in row]
    if failed:
        print(f"  failed, {'; '.join(failed)}", flush=True)
        return
    for part in SHOWN:
        _line(f"s {part}", [row["seconds"].get(part, 0.0) for row in rows.values()])
    for part in PARTS:
        _line(f"s compiling, {part}", [row["compile_seconds"][part] for row in rows.values()])
    _line("graphs", [len(row["graphs"]) for row in rows.values()])
    for count in sorted({count for row in rows.values() for count in row["caches"]}):
        _line(count, [row["caches"].get(count, 0) for row in rows.values()])
    _line("inside the clock", [row["compilations_inside_the_clock"] for row in rows.values()])
    _line("last loss", [row["losses"][-1] for row in rows.values()])
    _line("MB of cache", [row["cache_bytes"] / 1e6 for row in rows.values()])


def _line(title: str, values: list[float]) -> None:
    shown = [f"{value:12d}" if isinstance(value, int) else f"{value:12.3f}" for value in values]
    print(f"  {title:32s} " + "".join(shown), flush=True)


if __name__ == "__main__":
    main()
