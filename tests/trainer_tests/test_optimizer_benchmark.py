"""The benchmark of optimisers runs here at tiny sizes and saves what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.optim.orthogonalization import ORTHOGONALIZATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["all_reduce", "reduce_scatter"])
def test_every_orthogonalisation_is_timed(tmp_path: Path, form: str) -> None:
    out = tmp_path / "results" / "optimizers.json"
    command = [sys.executable, "-m", "benchmarks.optimizers", "--out", str(out), "--form", form]
    command += [
        "--layers",
        "2",
        "--width",
        "16",
        "--kv-width",
        "8",
        "--mlp-width",
        "40",
        "--repeats",
        "2",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    record = json.loads(out.read_text())
    assert record["shapes"] == {
        "q_and_out": [4, 16, 16],
        "k_and_v": [4, 8, 16],
        "up": [2, 40, 16],
        "down": [2, 16, 40],
    }
    rows = record["rows"]
    assert {row["orthogonalization"] for row in rows} == set(ORTHOGONALIZATIONS)
    assert rows[0]["orthogonalization"] == "newton_schulz" and rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["ratio"] == pytest.approx(row["step_ms"] / rows[0]["step_ms"])
        assert f"{row['step_ms']:.2f} ms" in done.stdout
