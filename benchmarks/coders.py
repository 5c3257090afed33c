"""Entropy coders on the codes of trained weights: bytes, seconds, and the code they bring along.

    python benchmarks/coders.py base/checkpoint.bin --out coders.json
    python benchmarks/coders.py a/checkpoint.bin --clip-sigmas 12.85 --embed-clip-sigmas 20

The weights of a checkpoint (runtime.save_checkpoint) are rounded to 6 bits with SDClip, without
calibration, and packed into an artifact by every coder and grouping. `ratio` is to the first row,
byte shuffle + brotli 11, in the same run; `code` is what the coder adds to the packed code over
zlib's. --quick leaves out what takes minutes on 36 million weights (brotli 11 beyond the first
row, lzma, zstd 22).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training import machine
from trainer import artifact, checkpoint
from trainer.code import packed_code
from trainer.config import TrainConfig
from trainer.quantize import QuantizedState, quantize

SLOW = {("brotli", 11), ("lzma", 9), ("zstd", 22)}
CODERS = [("brotli", 11), ("lzma", 9), ("zstd", 22), ("zlib", 9), ("rans", 9), ("rans_classes", 9)]


def main() -> None:
    """Pack in every way and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clip-sigmas", type=float, default=12.85)
    parser.add_argument("--embed-clip-sigmas", type=float, default=0.0)
    parser.add_argument("--embed-bits", type=int, default=0)
    parser.add_argument("--groupings", nargs="+", default=["type", "role", "role_transposed"])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = checkpoint.read_config(arguments.checkpoint).with_overrides(
        {
            "quantize.method": "round",
            "quantize.scheme": "int6",
            "quantize.clip": "sigma",
            "quantize.clip_sigmas": arguments.clip_sigmas,
            "quantize.embed_clip_sigmas": arguments.embed_clip_sigmas,
            "quantize.embed_bits": arguments.embed_bits,
            "quantize.awq_groups": 0,
            "quantize.low_rank": "off",
        }
    )
    weights = checkpoint.read(arguments.checkpoint)
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    quantized = quantize(state, config.quantize)
    rows: list[dict[str, Any]] = []
    for grouping in arguments.groupings:
        for codec, level in CODERS:
            if arguments.quick and rows and (codec, level) in SLOW:
                continue
            rows.append(_packed(quantized, config, codec, level, grouping))
            _print_row(rows[-1], rows[0])
    if arguments.out is not None:
        record = {"command": sys.argv, **machine(), "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _packed(
    quantized: QuantizedState, config: TrainConfig, codec: str, level: int, grouping: str
) -> dict[str, Any]:
    """Bytes of the artifact and of the coder's code, seconds of packing and unpacking."""
    coder = {
        "compress.codec": codec,
        "compress.level": level,
        "compress.byte_shuffle": True,
        "compress.grouping": grouping,
    }
    config = config.with_overrides(coder)
    start = time.perf_counter()
    blob = artifact.encode(quantized, config)
    packed = time.perf_counter()
    artifact.decode(blob)
    unpacked = time.perf_counter()
    plain = config.with_overrides({"compress.codec": "zlib", "compress.level": 9})
    return {
        "codec": codec,
        "level": level,
        "grouping": grouping,
        "bytes": len(blob),
        "code": len(packed_code(config)) - len(packed_code(plain)),
        "pack_s": packed - start,
        "unpack_s": unpacked - packed,
    }


def _print_row(row: dict[str, Any], first: dict[str, Any]) -> None:
    total, reference = row["bytes"] + row["code"], first["bytes"] + first["code"]
    print(
        f"{row['codec']:13s} {row['level']:2d} {row['grouping']:16s} {row['bytes']:12,} B  "
        f"code {row['code']:5,} B  ratio {total / reference:.4f}  "
        f"pack {row['pack_s']:7.2f} s  unpack {row['unpack_s']:6.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
