"""Plain, fused and interleaved heads side by side: one pass at full size, or whole short runs.

(a) A training pass, forward and backward, of slowrun_pr78 at full size in one micro-batch of four
    rows of 2048, as published; one GPU, medians, peak memory, each variant after the other:

    python3 -m benchmarks.iha pass --out benchmarks/results/iha_pass.json \\
        --variants plain fused interleaved

    Compiling takes minutes a variant. --visits 3 is the second half of the run, with layers
    repeated; --rows and --set path=value change the rest. The published ratios of whole steps are
    1.00, 1.03 and 1.76; a step also has the optimiser, once for eight such passes.

(b) Runs of slowrun_gpu by the clock and by the number of steps, every seed; on a machine with
    several GPUs as many at a time as --parallel says. Golf shards; the vocabulary is the
    tokenizer's:

    python3 -m benchmarks.iha train --data DIR --equal time --seconds 120 --seeds 1 2 \\
        --parallel 8 --set model.vocab_size=1024 --out benchmarks/results/iha_time.json
    python3 -m benchmarks.iha train --data DIR --equal epochs --steps 400 --seeds 1 2 \\
        --parallel 8 --set model.vocab_size=1024 --out benchmarks/results/iha_epochs.json

    400 steps are 52 million tokens; take about those that plain heads made in the first call. The
    learning rate, repeats and cycles follow the clock in the one and the steps in the other.

What fails is recorded with its error, and the rest goes on. Eager in fp32 where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.iha_training import add_arguments, train_variants
from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.account import count_parameters, flops_per_token
from trainer.config import TrainConfig, parse_overrides
from trainer.distributed import Group
from trainer.recipes import RECIPES
from trainer.workspace import build_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"model.iha": "off"},
    "fused": {"model.iha": "fused"},
    "interleaved": {"model.iha": "interleaved"},
    "mixed weights": {"model.iha": "interleaved", "model.iha_product": "weights"},
    "long layers plain": {"model.iha": "interleaved", "model.iha_layers": "short"},
    "no-op start": {
        "model.iha": "interleaved",
        "model.iha_init": "replicated",
        "model.iha_positions": "token",
        "model.iha_mask": "block",
        "model.iha_windows": "tokens",
    },
}


def main() -> None:
    """Measure every variant and write the figures."""
    arguments = _arguments()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"command": sys.argv, **machine(), "rows": []}
    if arguments.what == "train":
        train_variants(arguments, VARIANTS, record)
    else:
        _time_passes(arguments, record)


def _time_passes(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a training run sets it
    print(f"{'variant':20s} {'ms':>10s} {'/ first':>8s} {'GiB':>7s}", flush=True)
    for name in arguments.variants:
        row = {"variant": name, **_measure(name, arguments, device)}
        record["rows"].append(row)
        first_ms = record["rows"][0]["ms"]
        row["ratio"] = row["ms"] / first_ms if row["ms"] and first_ms else None
        _print_row(row)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    one_pass = commands.add_parser("pass", help="one training pass of each variant")
    one_pass.add_argument("--recipe", choices=RECIPES, default="slowrun_pr78")
    one_pass.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    one_pass.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    one_pass.add_argument("--visits", type=int, default=1, help="of the layers that repeat")
    one_pass.add_argument("--repeats", type=int, default=20)
    runs = commands.add_parser("train", help="whole runs of each variant")
    runs.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3])
    add_arguments(runs)
    for command in (one_pass, runs):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--set", action="append", default=[], help="PATH=VALUE for all")
    return parser.parse_args()


def _measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    overrides = {**VARIANTS[name], **parse_overrides(arguments.set)}
    config = RECIPES[arguments.recipe].build().with_overrides(overrides)
    row: dict[str, Any] = {
        "parameters": count_parameters(config.model),
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "ms": None,
        "peak_gib": None,
        "error": None,
    }
    try:
        row["ms"] = _milliseconds(config, arguments, device)
    except Exception as error:  # one variant's fault must not cost the others' figures
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def _milliseconds(
    config: TrainConfig, arguments: argparse.Namespace, device: torch.device
) -> float:
    """Of a pass of the training loss, dropout and the extra block included."""
    torch.compiler.reset()  # every variant compiles anew, and the library bounds how often
    torch.manual_seed(0)
    model = build_model(config, Group(device), lambda line: print(f"  {line}", flush=True))
    shape = (arguments.rows, config.data.seq_len)
    tokens, targets = (
        torch.randint(config.model.vocab_size, shape, device=device) for _ in range(2)
    )
    is_gpu = device.type == "cuda"
    forward = torch.compile(model, fullgraph=True, dynamic=False) if is_gpu else model

    def forward_and_backward() -> None:
        with model.visiting(arguments.visits):
            forward(tokens, targets, reduction="objective").backward()
        model.zero_grad(set_to_none=False)

    return 1000 * median_seconds(forward_and_backward, arguments.repeats, device)


def _print_row(row: dict[str, Any]) -> None:
    figures = (row["ms"], row["ratio"], row["peak_gib"])
    ms, ratio, gib = ("-" if number is None else f"{number:.3f}" for number in figures)
    print(f"{row['variant']:20s} {ms:>10s} {ratio:>8s} {gib:>7s}", flush=True)
    if row["error"]:
        print(f"  {row['error']}", flush=True)


if __name__ == "__main__":
    main()
