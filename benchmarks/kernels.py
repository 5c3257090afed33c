"""Checks every kernel against fp32 and times it against torch.compile of the plain code.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json

Shapes are those of pr1894 (98,304 rows of 512, hidden 2048, 8192 pieces) and golf_baseline (65,536
rows of 512, hidden 1024, 1024 pieces). All tensors are larger than the cache. Per candidate:

    error                worst relative error of output and gradients against fp32, on fewer rows
    forward_ms           median by CUDA events, keeping what the backward pass needs
    both_ms              forward and backward
    *_share              the least time that the case can take, over the time taken

The least time is the larger of operations over the measured rate of a matrix product and bytes over
the measured rate of a copy; bytes are the compulsory ones: inputs and outputs once, and one hidden
tensor kept for the backward pass. `tiles` times the up-projection alone by tile and by order of
tiles, next to the plain product. A kernel that fails leaves its error in the record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.kernels.choice import kernel_fault
from trainer.kernels.cross_entropy import softcapped_cross_entropy
from trainer.kernels.mlp import fused_mlp, norm_linear
from trainer.model.norm import rms_norm

SLOPE = 0.5
CAP = 30.0
MLP_SHAPES = ((98_304, 512, 2048), (65_536, 512, 1024))
LOSS_SHAPES = ((98_304, 8192), (65_536, 1024))
TILES = ((128, 256, 64), (256, 128, 64), (128, 128, 64))
GROUPS = (8, 1)
CHECKED_ROWS = 2048
ROUNDING = 0.015
"""Largest relative error of bf16 products on random input, with room."""

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """What is computed at one shape, and the ways of computing it."""

    name: str
    shape: tuple[int, ...]
    inputs: Callable[[int, torch.device], list[Tensor]]
    """From rows and device: fp32 leaves; integers are passed on as they are."""
    reference: Function
    candidates: dict[str, Function]
    """The plain code, "compiled", is the first."""
    forward_cost: tuple[float, float]
    """Operations and compulsory bytes."""
    both_cost: tuple[float, float]


def main() -> None:
    """Measure the ceilings, every candidate of every case, and the tiles; write after each."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"command": sys.argv, **machine(), "repeats": arguments.repeats}
    record |= {"ceilings": _ceilings(arguments, device), "rows": [], "tiles": []}
    print(json.dumps(record["ceilings"]), flush=True)
    for case in [*map(_mlp_case, MLP_SHAPES), *map(_norm_case, MLP_SHAPES), *_loss_cases()]:
        for name, function in case.candidates.items():
            if arguments.only and arguments.only not in f"{case.name} {name}":
                continue
            row = {"case": case.name, "shape": case.shape, "candidate": name}
            with _recorded_errors(row):
                _measure(row, case, function, record["ceilings"], arguments, device)
            record["rows"].append(row)
            _save(record, arguments.out)
            print(_line(row), flush=True)
    for row in _tile_rows(arguments, device):
        record["tiles"].append(row)
        _save(record, arguments.out)
        print(json.dumps(row), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shrink", type=int, default=1, help="divide the rows by this")
    parser.add_argument("--only", default="", help="candidates whose case and name hold this text")
    return parser.parse_args()


def _save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def _recorded_errors(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one kernel's fault must not cost the others' figures
        row["error_message"] = f"{type(error).__name__}: {str(error)[:600]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _mlp_case(shape: tuple[int, int, int]) -> Case:
    rows, width, hidden = shape

    def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.leaky_relu(F.linear(rms_norm(x), up), SLOPE).square(), down)

    def fused(x: Tensor, up: Tensor, down: Tensor, keep_slope: bool, norm: bool) -> Tensor:
        if norm:
            return fused_mlp(x, up, down, SLOPE, keep_slope, norm_scale=1.0)
        return fused_mlp(rms_norm(x), up, down, SLOPE, keep_slope)

    products = 4.0 * rows * width * hidden
    activations, weights, kept = 2.0 * rows * width, 4.0 * width * hidden, 2.0 * rows * hidden
    forward = (products, 2 * activations + weights + kept)
    backward = (2 * products, 3 * activations + 2 * weights + kept)
    return Case(
        "norm and MLP",
        shape,
        partial(_matrices, ((0, width), (hidden, width), (width, hidden))),
        plain,
        {
            "compiled": plain,
            "fused": partial(fused, keep_slope=False, norm=False),
            "fused_saved": partial(fused, keep_slope=True, norm=False),
            "fused_norm": partial(fused, keep_slope=False, norm=True),
            "fused_norm_saved": partial(fused, keep_slope=True, norm=True),
        },
        forward,
        (forward[0] + backward[0], forward[1] + backward[1]),
    )


def _norm_case(shape: tuple[int, int, int]) -> Case:
    rows, width, hidden = shape

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rms_norm(x), weight)

    product = 2.0 * rows * width * hidden
    narrow, weights, wide = 2.0 * rows * width, 2.0 * width * hidden, 2.0 * rows * hidden
    forward = (product, narrow + weights + wide)
    return Case(
        "norm and matrix",
        shape,
        partial(_matrices, ((0, width), (hidden, width))),
        plain,
        {"compiled": plain, "fused": norm_linear},
        forward,
        (3 * product, forward[1] + 2 * narrow + 2 * weights + wide),
    )


def _loss_cases() -> Iterator[Case]:
    for rows, vocab in LOSS_SHAPES:
        yield Case(
            "cross-entropy",
            (rows, vocab),
            partial(_logits, vocab),
            _plain_loss,
            {"compiled": _plain_loss, "fused": _fused_loss},
            (0.0, 2.0 * rows * vocab),
            (0.0, 6.0 * rows * vocab),
        )


def _plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(CAP * torch.tanh(logits.float() / CAP), targets, reduction="none")


def _fused_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return softcapped_cross_entropy(logits, targets, CAP)


def _matrices(shapes: tuple[tuple[int, int], ...], rows: int, device: torch.device) -> list[Tensor]:
    """The first is activations of so many rows; weights keep the scale of what they multiply."""
    generator = torch.Generator(device).manual_seed(0)
    (_, width), *weights = shapes
    made = [torch.randn(rows, width, device=device, generator=generator)]
    for shape in weights:
        made.append(torch.randn(shape, device=device, generator=generator) / shape[1] ** 0.5)
    return made


def _logits(vocab: int, rows: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = 10 * torch.randn(rows, vocab, device=device, generator=generator)
    return [logits, torch.randint(vocab, (rows,), device=device, generator=generator)]


def _measure(
    row: dict[str, Any],
    case: Case,
    function: Function,
    ceilings: dict[str, float],
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    torch.compiler.reset()
    rows = max(8, case.shape[0] // arguments.shrink)
    row["error"] = _error(function, case, min(rows, CHECKED_ROWS), device)
    row["right"] = row["error"] < ROUNDING
    inputs = [_cast(x, device) for x in case.inputs(rows, device)]
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    call = compiled if device.type == "cuda" else function
    leaves = [x for x in inputs if x.requires_grad]
    cotangent = torch.randn_like(call(*inputs).detach())

    def forward() -> Tensor:
        return call(*inputs)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, cotangent)

    for name, timed, cost in (
        ("forward", forward, case.forward_cost),
        ("both", both, case.both_cost),
    ):
        row[f"{name}_ms"] = 1000 * median_seconds(timed, arguments.repeats, device)
        flops, num_bytes = (part * rows / case.shape[0] for part in cost)
        least = max(flops / ceilings["flops_per_s"], num_bytes / ceilings["bytes_per_s"])
        row |= {f"{name}_flops": flops, f"{name}_bytes": num_bytes}
        row[f"{name}_share"] = 1000 * least / row[f"{name}_ms"]


def _cast(x: Tensor, device: torch.device) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.to(torch.bfloat16 if device.type == "cuda" else torch.float32).requires_grad_()


def _error(function: Function, case: Case, rows: int, device: torch.device) -> float:
    results = []
    given = [_cast(x, device) for x in case.inputs(rows, device)]
    for compute, dtype in ((function, None), (case.reference, torch.float32)):
        inputs = [
            x.detach().to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x
            for x in given
        ]
        with _full_precision():
            out = compute(*inputs)
            cotangent = torch.linspace(-3, 3, out.numel(), device=device).cos().view(out.shape)
            leaves = [x for x in inputs if x.requires_grad]
            gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
        results.append([x.detach().float() for x in (out, *gradients)])
    return max(float((got - want).norm() / want.norm()) for got, want in zip(*results, strict=True))


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ceilings(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Rates of a large product and of a large copy (both directions counted), on this machine."""
    size = 8192 if device.type == "cuda" else 128
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, arguments.repeats, device)
    source = torch.randn(2**29 if device.type == "cuda" else 2**16, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), arguments.repeats, device)
    moved = 2 * source.numel() * source.element_size()
    return {"flops_per_s": 2.0 * size**3 / product, "bytes_per_s": moved / copy}


def _tile_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The up-projection alone: the plain product, then each tile in each order."""
    if arguments.only and arguments.only not in "tiles":
        return
    fault = kernel_fault(device.type, 9)
    if fault is not None:
        yield {"error_message": fault}
        return
    from trainer.kernels import mlp_triton

    chosen = mlp_triton.TILE, mlp_triton.GROUP_M
    for shape in MLP_SHAPES:
        x, up = (
            _cast(t, device).detach()
            for t in _matrices(((0, shape[1]), (shape[2], shape[1])), shape[0], device)
        )
        plain = median_seconds(partial(F.linear, x, up), arguments.repeats, device)
        yield {"shape": shape, "plain_product_ms": 1000 * plain}
        for tile in TILES:
            for group in GROUPS:
                row: dict[str, Any] = {"shape": shape, "tile": tile, "group": group}
                mlp_triton.TILE, mlp_triton.GROUP_M = tile, group
                mlp_triton._shallower.clear()
                with _recorded_errors(row):
                    call = partial(mlp_triton.up_and_activate, x, up, None, SLOPE, False)
                    row["ms"] = 1000 * median_seconds(call, arguments.repeats, device)
                mlp_triton.TILE, mlp_triton.GROUP_M = chosen
                yield row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['case']:16s} {'x'.join(map(str, row['shape'])):16s} {row['candidate']:17s}"
    if "error_message" in row:
        return f"{head} {row['error_message']}"
    times = (
        f"{name} {row[f'{name}_ms']:8.3f} ms ({row[f'{name}_share']:4.0%} of the roofline)"
        for name in ("forward", "both")
    )
    verdict = "right" if row["right"] else "WRONG"
    return f"{head} {'  '.join(times)}  error {row['error']:.1e} {verdict}"


if __name__ == "__main__":
    main()
