"""Uniform 6 bits with SDClip against shared-out steps, on weights that are trained already.

    python benchmarks/allocation.py base/checkpoint.bin --data DIR --out allocation.json \\
        --cap 360000 --set quantize.allocate_tokens=16384          # tiny, on a CPU
    python benchmarks/allocation.py a/checkpoint.bin b/checkpoint.bin --data DIR \\
        --out benchmarks/results/allocation.json                   # pr1894 or frontier, one GPU

A checkpoint is what runtime.save_checkpoint = true writes; several are seeds of one recipe. Each is
packed three times, in fresh processes, with the settings it was trained with, one codec for all:

    uniform   its own bits and clips
    equal     quantize.allocate with the bytes of `uniform` as the cap
    cap       quantize.allocate with --cap bytes (default: budget.artifact_bytes)

and scored in plain rows. Prints bits per byte, bytes, the share of the cap and seconds; the JSON
holds every result. --prequant adds the weights as trained. Give --set evaluate.stride=64 or more of
its kind for another score.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training import machine
from trainer.checkpoint import read_config

PLAIN = [
    "evaluate.ttt=off",
    "evaluate.stride=0",
    "evaluate.tilt_beta=0",
    "compress.codec=rans_classes",
    "compress.level=9",
    "compress.grouping=role",
    "budget.train_seconds=600",
    "quantize.method=gptq",
    "quantize.reserve_seconds=60",
    "schedule.progress=clock",
    "source.artifact=",
    "runtime.save_checkpoint=false",
]


def main() -> None:
    """Pack and score every checkpoint three times, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cap", type=int, help="bytes of code and model")
    parser.add_argument("--set", action="append", default=[], help="override for every run")
    parser.add_argument("--prequant", action="store_true")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"command": sys.argv, **machine(), "runs": {}}
    for path in arguments.checkpoints:
        runs = record["runs"][str(path)] = {}
        cap = arguments.cap or read_config(path).budget.artifact_bytes or 16_000_000
        runs["uniform"] = _run(arguments, path, 10 * cap, [])
        uniform = runs["uniform"]
        bytes_uniform = uniform["bytes_code"] + uniform["bytes_model"]
        shared = ["quantize.allocate=rate_distortion"]
        for name, limit in (("equal", bytes_uniform), ("cap", cap)):
            runs[name] = _run(arguments, path, limit, shared)
        for name, limit in (("uniform", cap), ("equal", bytes_uniform), ("cap", cap)):
            _print_row(f"{path.parent.name} {name}", runs[name], limit)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in ("equal", "cap"):
        gains = [r["uniform"]["val_bpb"] - r[name]["val_bpb"] for r in record["runs"].values()]
        spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
        print(f"gain, {name:8s} {statistics.fmean(gains):+.5f} +- {spread:.5f} bits per byte")


def _run(
    arguments: argparse.Namespace, checkpoint: Path, cap: int, overrides: list[str]
) -> dict[str, Any]:
    """The result of one packing, with the lines of its log that say what was chosen."""
    config = read_config(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "config.json", Path(folder) / "out"
        base.write_text(json.dumps(config.to_dict()))
        command = [sys.executable, "-m", "trainer", "--config", str(base), "--out", str(out)]
        settings = [
            *PLAIN,
            f"data.dir={arguments.data}",
            f"source.checkpoint={checkpoint}",
            f"budget.artifact_bytes={cap}",
            f"evaluate.prequant={str(arguments.prequant).lower()}",
            *overrides,
            *arguments.set,
        ]
        for pair in settings:
            command += ["--set", pair]
        subprocess.run(command, check=True)
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
        lines = (out / "train.log").read_text().splitlines()
        return {**result, "log": [line for line in lines if "allocate" in line]}


def _print_row(name: str, run: dict[str, Any], cap: int) -> None:
    total = run["bytes_code"] + run["bytes_model"]
    phases = {key: round(value, 1) for key, value in run["phases"].items()}
    packing = sum(phases.get(key, 0.0) for key in ("calibrate", "quantize", "pack"))
    print(
        f"{name:24s} bpb {run['val_bpb']:.5f}  {total:12,} B  {total / cap:8.4%} of {cap:,}  "
        f"{packing:6.1f} s to pack  {phases}",
        flush=True,
    )


if __name__ == "__main__":
    main()
