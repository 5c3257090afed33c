"""Times Muon's step under every orthogonalisation, and saves the figures.

    python -m benchmarks.optimizers --out benchmarks/results/optimizers.json

The matrices are those of a GPT of the given size (by default of #1894: 11 layers, width 512, MLP
2048) with random gradients. Per rule: the median milliseconds of a whole step, and of the rule
alone for each shape, where the aspect tells whether working on the short side pays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.distributed import Group
from trainer.optim.muon import Muon
from trainer.optim.orthogonalization import ORTHOGONALIZATIONS, UpdateRule
from trainer.optim.rules import ParamRule
from trainer.optim.sharded_muon import ShardedMuon

FORMS: dict[str, type[Muon] | type[ShardedMuon]] = {
    "all_reduce": Muon,
    "reduce_scatter": ShardedMuon,
}
NUM_STEPS = {"newton_schulz": 5, "polar_express": 5, "gram": 5, "turbo": 4}
"""As published."""
RULES = (
    *(UpdateRule(name) for name in ORTHOGONALIZATIONS),
    UpdateRule("newton_schulz", row_eps=1e-7),
    UpdateRule("polar_express", row_eps=1e-7),
    UpdateRule("turbo", post_norm="row_col"),
)


def main() -> None:
    """Measure every rule and write the figures."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a training run sets it
    shapes = _shapes(arguments)
    record: dict[str, Any] = {"command": sys.argv, **machine(), "form": arguments.form}
    record |= {"repeats": arguments.repeats, "shapes": shapes, "rows": []}
    for rule in RULES:
        row = _measure(rule, shapes, arguments, device)
        record["rows"].append(row)
        row["ratio"] = row["step_ms"] / record["rows"][0]["step_ms"]
        _print_row(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--kv-width", type=int, default=256)
    parser.add_argument("--mlp-width", type=int, default=2048)
    parser.add_argument("--form", choices=FORMS, default="all_reduce")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


def _shapes(arguments: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Number, rows and columns of the matrices of each shape."""
    layers, width = arguments.layers, arguments.width
    return {
        "q_and_out": (2 * layers, width, width),
        "k_and_v": (2 * layers, arguments.kv_width, width),
        "up": (layers, arguments.mlp_width, width),
        "down": (layers, width, arguments.mlp_width),
    }


def _measure(
    rule: UpdateRule,
    shapes: dict[str, tuple[int, int, int]],
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Milliseconds of a step, and of the rule for each shape."""
    num_steps = NUM_STEPS[rule.orthogonalization]
    step = _step(rule, num_steps, shapes, arguments.form, device)
    row: dict[str, Any] = {
        "orthogonalization": rule.orthogonalization,
        "row_normalize": rule.row_eps is not None,
        "post_norm": rule.post_norm,
        "num_steps": num_steps,
        "step_ms": 1000 * median_seconds(step, arguments.repeats, device),
    }
    for name, shape in shapes.items():
        call = _rule_alone(rule, num_steps, shape, device)
        row[f"{name}_ms"] = 1000 * median_seconds(call, arguments.repeats, device)
    return row


def _step(
    rule: UpdateRule,
    num_steps: int,
    shapes: dict[str, tuple[int, int, int]],
    form: str,
    device: torch.device,
) -> Callable[[], None]:
    generator = torch.Generator(device).manual_seed(0)
    treatment = ParamRule("*", "muon", lr=0.02, weight_decay=0.095)
    params = []
    for name, (count, *shape) in shapes.items():
        for place in range(count):
            param = nn.Parameter(torch.randn(*shape, device=device, generator=generator))
            param.grad = torch.randn(*shape, device=device, generator=generator)
            params.append((f"{name}.{place}", param, treatment))
    muon = FORMS[form](params, num_steps, Group(device), rule)
    return lambda: muon.step(1.0, 0.97)


def _rule_alone(
    rule: UpdateRule, num_steps: int, shape: tuple[int, int, int], device: torch.device
) -> Callable[[], None]:
    stack = torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(1))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def call() -> None:
        rule(stack, num_steps, dtype)

    return call


def _print_row(row: dict[str, Any]) -> None:
    name = row["orthogonalization"] + (" + rows" if row["row_normalize"] else "")
    name += f" + {row['post_norm']}" if row["post_norm"] != "none" else ""
    parts = [f"{key[:-3]} {value:.2f}" for key, value in row.items() if key.endswith("_ms")]
    print(f"{name:28s} {' ms, '.join(parts)} ms  x{row['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
