"""The benchmark of windows runs here at tiny sizes and saves what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_backend_is_timed_at_every_length(tmp_path: Path) -> None:
    out = tmp_path / "results" / "windows.json"
    command = [sys.executable, "-m", "benchmarks.windows", "--out", str(out)]
    command += [
        "--lengths",
        "32",
        "64",
        "--window",
        "8",
        "--tokens",
        "128",
        "--heads",
        "4",
        "--kv-heads",
        "2",
    ]
    command += ["--head-dim", "8", "--repeats", "3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] and record["window"] == 8
    rows = [(row["backend"], row["length"]) for row in record["rows"]]
    assert rows == [(name, length) for name in ("sdpa", "flex", "auto") for length in (32, 64)]
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row["windowed_ms"] / row["full_ms"])
        assert f"{row['ratio']:.3f}" in done.stdout
