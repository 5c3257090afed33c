"""Times a model's pass forward and backward with plain, fused and interleaved heads, side by side.

    python -m benchmarks.iha --out benchmarks/results/iha.json

The shape is that of slowrun #78 unless told otherwise: 30 layers of width 1792, windows SSSL of
half a row. The published ratios of whole steps are 1.00, 1.03 and 1.76; a step also has the
optimiser, once for eight such passes. By CUDA events, compiled, in bf16 where there is a GPU; eager
in fp32 elsewhere. What fails is recorded with its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.account import count_parameters, flops_per_token
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.model.gpt import GPT

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"iha": "fused"},
    "interleaved": {"iha": "interleaved"},
    "interleaved, mixed weights": {"iha": "interleaved", "iha_product": "weights"},
    "interleaved, long layers plain": {"iha": "interleaved", "iha_layers": "short"},
    "no-op start": {
        "iha": "interleaved",
        "iha_init": "replicated",
        "iha_positions": "token",
        "iha_mask": "block",
        "iha_windows": "tokens",
    },
}


def main() -> None:
    """Measure every variant and write the figures."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"command": sys.argv, **machine(), "rows": []}
    print(f"{'variant':32s} {'ms':>10s} {'/ plain':>8s} {'GiB':>7s}", flush=True)
    for name in arguments.variants:
        row = {"variant": name, **_measure(name, arguments, device)}
        record["rows"].append(row)
        plain_ms = record["rows"][0]["ms"]
        row["ratio"] = row["ms"] / plain_ms if row["ms"] and plain_ms else None
        _print_row(row)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--pseudo-heads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


def _config(name: str, arguments: argparse.Namespace) -> ModelConfig:
    interleaved = VARIANTS[name].get("iha") == "interleaved"
    return ModelConfig(
        vocab_size=arguments.vocab,
        num_layers=arguments.layers,
        model_dim=arguments.width,
        num_heads=arguments.heads,
        num_kv_heads=arguments.heads,
        mlp_mult=4.0,
        tie_embeddings=False,
        window=arguments.length // 2,
        window_layers="SSSL",
        **VARIANTS[name],
        **({"iha_pseudo_heads": arguments.pseudo_heads} if interleaved else {}),
    )


def _measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config = _config(name, arguments)
    row: dict[str, Any] = {
        "parameters": count_parameters(config),
        "flops_per_token": flops_per_token(config, arguments.length),
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
    config: ModelConfig, arguments: argparse.Namespace, device: torch.device
) -> float:
    torch.compiler.reset()  # every variant compiles anew, and the library bounds how often
    torch.manual_seed(0)
    attend = select_backend("auto", device.type, lambda line: None, windowed=True)
    with device:
        model = GPT(config, attend, arguments.length)
        shape = (arguments.rows, arguments.length)
        tokens, targets = (torch.randint(config.vocab_size, shape) for _ in range(2))
    is_gpu = device.type == "cuda"
    model.compute_dtype = torch.bfloat16 if is_gpu else torch.float32
    forward = torch.compile(model, fullgraph=True, dynamic=False) if is_gpu else model

    def forward_and_backward() -> None:
        forward(tokens, targets).backward()

    return 1000 * median_seconds(forward_and_backward, arguments.repeats, device)


def _print_row(row: dict[str, Any]) -> None:
    figures = (row["ms"], row["ratio"], row["peak_gib"])
    ms, ratio, gib = ("-" if number is None else f"{number:.3f}" for number in figures)
    print(f"{row['variant']:32s} {ms:>10s} {ratio:>8s} {gib:>7s}", flush=True)
    if row["error"]:
        print(f"  {row['error']}", flush=True)


if __name__ == "__main__":
    main()
