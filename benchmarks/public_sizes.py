"""The public runs' sizes as facts for the size model. The folder is that of sizes.jsonl.xz and
runs.jsonl.xz, whose README says what the fields are; it is not part of this repository.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.filters.size_facts import USUAL_SECONDS, USUAL_STEPS, coded_bits
from service.filters.size_model import SizeFacts

Row = dict[str, Any]
SCHEME_BITS = {"int4": 4, "int5": 5, "int6": 6, "int8": 8, "int63": 7, "gptq": 6, "ternary": 2}
"""By the label of the log; others are taken as 6 bits."""
USUAL_COLUMNS = 512
SCALE_BITS = 16
"""Of a row."""


@dataclass(frozen=True)
class PublicSize:
    """One artifact that was published."""

    date: str
    """UTC day of the first commit with its log."""
    order: tuple[Any, ...]
    """Sorts runs of one day: pull request, folder, settings, seed."""
    row: Row
    facts: SizeFacts
    reckoned: float
    bytes_code: int
    bytes_model: int

    @property
    def log_ratio(self) -> float:
        return math.log(self.bytes_model / self.reckoned)

    @property
    def total(self) -> int:
        return self.bytes_code + self.bytes_model

    @property
    def in_record_track(self) -> bool:
        """Sent to the 10-minute, 16,000,000-byte track."""
        return bool(self.row["track"] == "main_10min")

    @property
    def family(self) -> tuple[Any, ...]:
        """A recipe family: the same way of coding and the same number of parameters."""
        return self.facts.groups[1], self.row["num_params"]


def read_public_sizes(folder: Path) -> list[PublicSize]:
    """Complete runs whose model and code bytes add up and whose parameters are known, oldest first.

    Raises:
        SystemExit: The folder lacks a file.
    """
    try:
        runs = {row["run_id"]: row for row in _rows(folder / "runs.jsonl.xz")}
        sizes = list(_rows(folder / "sizes.jsonl.xz"))
    except FileNotFoundError as error:
        sys.exit(f"{error.filename}: no such file; give the folder of the public runs with --runs")
    wanted = ("bytes_model", "num_params", "bytes_sum_ok", "complete")
    usable = [row for row in sizes if row["source"] == "log" and all(row.get(k) for k in wanted)]
    found = [_public_size(row, runs[row["run_id"]]) for row in usable]
    return sorted(found, key=lambda size: (size.date, size.order))


def _rows(path: Path) -> Iterator[Row]:
    with lzma.open(path, "rt") as lines:
        yield from map(json.loads, lines)


def _public_size(row: Row, run: Row) -> PublicSize:
    order = (
        row["pr"] or 0,
        row["record_folder"],
        row["config_id"],
        row["seed"] or 0,
        row["row_id"],
    )
    code = row["bytes_total"] - row["bytes_model"]
    groups = _groups(row, run)
    facts = SizeFacts(groups, _numbers(row, run), scale_free=groups[0] == "sigma")
    return PublicSize(row["date"], order, row, facts, _reckoned(row), code, row["bytes_model"])


def _groups(row: Row, run: Row) -> tuple[str | None, ...]:
    sigma = row["echo"].get("matrix_clip_sigmas") is not None
    rule = "sigma" if sigma else "floored"
    scheme = "" if sigma else f"|{row['quant_scheme']}"
    way = f"{rule}{scheme}|{row['compressor']}"
    line = f"pr{row['pr']}|{way}" if row["pr"] else None
    script = run["script_id"] or row["record_folder"]
    recipe = f"{script}|{way}|{row['num_params']}"
    return rule, way, line, recipe, f"{row['config_id']}|{way}"


def _numbers(row: Row, run: Row) -> tuple[float | None, ...]:
    echo = row["echo"]
    seconds = (run["cap_s"] or USUAL_SECONDS) * (run["world_size"] or 8)
    embed_bits = row["embed_bits"]
    return (
        math.log(seconds),
        math.log(run["total_steps"] or USUAL_STEPS),
        math.log(row["num_params"]),
        _log(row["batch_tokens"]),
        _log(row["seq_len"]),
        _float(echo.get("matrix_clip_sigmas")),
        _float(echo.get("embed_clip_sigmas")),
        _float(embed_bits),
    )


def _reckoned(row: Row) -> float:
    """Bytes by account, from what the log prints; the embedding apart where its shape is known."""
    echo, codec = row["echo"], row["compressor"] or ""
    bits = row["matrix_bits"] or SCHEME_BITS.get(row["quant_scheme"] or "", 6)
    columns = row["model_dim"] or USUAL_COLUMNS
    embedding = (row["vocab_size"] or 0) * (row["model_dim"] or 0)
    embedding = embedding if embedding < row["num_params"] else 0
    embed_bits, embed_sigmas = int(row["embed_bits"] or bits), _float(echo.get("embed_clip_sigmas"))
    total = embedding * coded_bits(embed_bits, embed_sigmas, columns, codec)
    total += embedding / columns * SCALE_BITS
    for kind, share in _matrix_shares(row).items():
        numel = share * (row["num_params"] - embedding)
        sigmas = _float(echo.get(f"{kind}_clip_sigmas") or echo.get("matrix_clip_sigmas"))
        total += numel * coded_bits(bits, sigmas, columns, codec)
        wide = row["mlp_mult"] if kind == "mlp" else 1.0  # half of an MLP has rows so much longer
        total += numel / columns * (1 + 1 / wide) / 2 * SCALE_BITS
    return total / 8


def _matrix_shares(row: Row) -> dict[str, float]:
    """How the matrices divide into MLP and attention, by the stock block."""
    mlp, heads = row["mlp_mult"] or 0, row["num_heads"] or 0
    if not mlp or not heads:
        return {"matrix": 1.0}
    attention = 2 + 2 * (row["num_kv_heads"] or heads) / heads
    return {"mlp": 2 * mlp / (2 * mlp + attention), "attn": attention / (2 * mlp + attention)}


def _log(value: float | None) -> float | None:
    return math.log(value) if value else None


def _float(value: Any) -> float | None:
    return float(value) if value else None
