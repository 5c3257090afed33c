"""The benchmark of interleaved heads runs here at a tiny size and saves what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_variant_is_timed_beside_the_plain_one(tmp_path: Path) -> None:
    out = tmp_path / "results" / "iha.json"
    size = {"layers": 4, "width": 16, "heads": 2, "vocab": 32, "length": 16, "rows": 2}
    command = [sys.executable, "-m", "benchmarks.iha", "--out", str(out), "--repeats", "3"]
    command += [word for name, value in size.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["error"] for row in rows] == [None] * 6
    by_name = {row["variant"]: row for row in rows}
    extra = {name: row["parameters"] - rows[0]["parameters"] for name, row in by_name.items()}
    assert extra["fused"] == 4 * 3 * 2 * 2 and extra["interleaved"] == 4 * (3 * 2 * 2 * 2 + 4)
    assert by_name["no-op start"]["flops_per_token"] > rows[0]["flops_per_token"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / rows[0]["ms"])
        assert f"{row['ratio']:.3f}" in done.stdout
