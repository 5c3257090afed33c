"""Trains a recipe in named variants, one after another on this machine, and saves the figures.

    python benchmarks/training.py golf_baseline --data DIR --out benchmarks/results/x.json \\
        --set runtime.log_every=50 \\
        --run "equal steps: budget.max_steps=487 schedule.progress=steps" \\
        --run "150 s: budget.train_seconds=150"

Each variant is a fresh process of `python -m trainer` (or torchrun with --nproc), so no variant
profits from the compilation of another. The JSON holds the command, versions, hardware, and for
every variant the overrides, the whole result.json and the curve.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "flash-attn-4", "numpy", "sentencepiece", "brotli")


def main() -> None:
    """Run the variants and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="override for every variant")
    parser.add_argument("--run", action="append", default=[], help='"name: path=value ..."')
    parser.add_argument("--nproc", type=int, default=1)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"command": sys.argv, **machine(), "runs": {}}
    for variant in arguments.run or ["plain:"]:
        name, _, pairs = variant.partition(":")
        overrides = [*arguments.set, *pairs.split()]
        record["runs"][name] = run_recipe(
            arguments.recipe, arguments.data, overrides, arguments.nproc
        )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        _print_row(name, record["runs"][name])


def run_recipe(
    recipe: str,
    data: str,
    overrides: list[str],
    nproc: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A run in a process of its own: its overrides, result and curve, or its exit code."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={nproc}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "-m", "trainer", "--recipe", recipe, "--out", folder]
        for pair in [f"data.dir={data}", *overrides]:
            command += ["--set", pair]
        done = subprocess.run(command, check=False, env=environment)
        result = Path(folder) / "result.json"
        if not result.exists():
            return {"overrides": overrides, "exit_code": done.returncode}
        curve = [
            {key: row[key] for key in ("step", "elapsed_s", "train_loss", "step_ms")}
            for row in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == "step"
        ]
        return {"overrides": overrides, "result": json.loads(result.read_text()), "curve": curve}


def machine() -> dict[str, Any]:
    """Versions and hardware that figures were measured with."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "device_count": torch.cuda.device_count() if cuda else 0,
    }


def _print_row(name: str, run: dict[str, Any]) -> None:
    if "result" not in run:
        print(f"{name:28s} failed with exit code {run['exit_code']}", flush=True)
        return
    result = run["result"]
    rate = result["tokens"] / result["phases"]["train"]
    bytes_total = (result["bytes_code"] or 0) + (result["bytes_model"] or 0)
    print(
        f"{name:28s} steps {result['steps']:6d}  {result['step_ms']:8.2f} ms  {rate:12,.0f} tok/s  "
        f"bpb {result['val_bpb_prequant'] or float('nan'):.4f} -> {result['val_bpb']:.4f}  "
        f"{bytes_total:,} B  peak {result['peak_memory_bytes'] / 2**30:.1f} GiB  "
        f"phases { ({key: round(value, 2) for key, value in result['phases'].items()}) }",
        flush=True,
    )


if __name__ == "__main__":
    main()
