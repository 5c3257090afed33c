"""Times one layer's attention, forward and backward: full, windowed, and within documents.

    python -m benchmarks.windows --out benchmarks/results/windows.json

For each backend that runs here, and for "auto", which may take one backend for windows and another
for full attention: medians over calls at several row lengths with equal tokens in all, by CUDA
events where there is a GPU. Documents have geometric lengths, the rows of all backends the same.
What fails is recorded with its error, and the rest goes on. The published gains of whole steps (15,
21 and 25 % at 4096, 6144 and 8192) are smaller than these, because a step is more than attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.attention import ATTENTION, Attend, Documents, select_backend

LENGTHS = (2048, 4096, 6144, 8192)
TIMES = ("full_ms", "windowed_ms", "documents_ms")
HEADER = (
    f"{'backend':8s} {'length':>7s} {'full':>10s} {'windowed':>10s} {'documents':>10s}"
    "  windowed / full"
)
BOS = 1


def main() -> None:
    """Measure every backend at every length and write the figures."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim")}
    record: dict[str, Any] = {"command": sys.argv, **machine(), "window": arguments.window}
    record |= {"tokens": arguments.tokens, **shape, "repeats": arguments.repeats}
    record |= {"document_len": arguments.document_len, "rows": []}
    print(HEADER, flush=True)
    for backend in _backends(device):
        for length in arguments.lengths:
            row = {"backend": backend, "length": length, **_compare(backend, length, arguments)}
            record["rows"].append(row)
            _print_row(row)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--window", type=int, default=512, help="tokens seen before the own one")
    parser.add_argument("--document-len", type=int, default=700, help="mean tokens of a document")
    parser.add_argument("--tokens", type=int, default=73_728, help="of all rows together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


def _backends(device: torch.device) -> list[str]:
    """Those of the table that run here, and "auto"."""
    return [*(name for name, row in ATTENTION.items() if not row.fault(device.type)), "auto"]


def _compare(backend: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by kind of attention, None for what does not fit in memory or fails, and the
    errors."""
    row: dict[str, Any] = {"errors": {}}
    for name in TIMES:
        try:
            row[name] = _milliseconds(backend, length, name, arguments)
        except Exception as error:  # one backend's fault must not cost the others' figures
            row[name] = None
            row["errors"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    full, windowed = row["full_ms"], row["windowed_ms"]
    return {**row, "ratio": windowed / full if full and windowed else None}


def _milliseconds(backend: str, length: int, name: str, arguments: argparse.Namespace) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.compiler.reset()  # every shape compiles anew, and the library bounds how often
    options: dict[str, Any] = {"window": arguments.window if name == "windowed_ms" else None}
    inputs = _inputs(length, arguments, device)
    if name == "documents_ms":
        options["documents"] = _documents(len(inputs[0]), length, arguments, device)
    attend = select_backend(
        backend,
        device.type,
        lambda line: None,
        windowed=name == "windowed_ms",
        documents=name == "documents_ms",
    )
    call = _call(partial(attend, **options), inputs)
    return 1000 * median_seconds(call, arguments.repeats, device)


def _documents(
    rows: int, length: int, arguments: argparse.Namespace, device: torch.device
) -> Documents:
    draws = torch.rand(rows, length, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.where(draws < 1 / arguments.document_len, BOS, BOS + 1)
    return Documents(tokens_BT.to(device), BOS)


def _inputs(length: int, arguments: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """q, k, v of unit normal numbers, and a gradient of the output that differs by position."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = max(1, arguments.tokens // length)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    made = [
        torch.randn(rows, length, count, arguments.head_dim, device=device, generator=generator)
        for count in heads
    ]
    return [tensor.to(dtype) for tensor in made]


def _call(attend: Attend, inputs: list[Tensor]) -> Callable[[], None]:
    q_BTHD, k_BTGD, v_BTGD = (tensor.requires_grad_() for tensor in inputs[:3])

    def forward_and_backward() -> None:
        out_BTHD = attend(q_BTHD, k_BTGD, v_BTGD)
        torch.autograd.grad(out_BTHD, (q_BTHD, k_BTGD, v_BTGD), inputs[3])

    return forward_and_backward


def _print_row(row: dict[str, Any]) -> None:
    times = " ".join(
        f"{'failed' if row[name] is None else f'{row[name]:.3f} ms':>10s}" for name in TIMES
    )
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    print(f"{row['backend']:8s} {row['length']:7d} {times}  {ratio}", flush=True)
    for name, error in row["errors"].items():
        print(f"  {name}: {error}", flush=True)


if __name__ == "__main__":
    main()
