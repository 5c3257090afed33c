"""The benchmark of one interleaved layer runs here at a tiny size and saves what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *more: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "results" / "layer.json"
    size = {"width": 32, "heads": 2, "length": 16, "rows": 2, "repeats": 3}
    command = [sys.executable, "-m", "benchmarks.iha_layer", "--out", str(out), *more]
    command += [word for name, value in size.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(out.read_text()), done.stdout


def test_every_form_is_timed_beside_plain_heads(tmp_path: Path) -> None:
    record, printed = run(tmp_path)
    layers, parts = record["layers"], record["parts"]
    for layer in ("short", "long"):
        for form in ("plain", "kernel", "heads", "weights"):
            row = layers[f"{layer} {form}"]
            assert row["ratio"] == pytest.approx(
                row["both_ms"] / layers[f"{layer} plain"]["both_ms"]
            )
            assert f"ratio {row['ratio']:.4g}" in printed
    total = sum(layers[f"{x} kernel"]["both_ms"] * n for x, n in (("short", 22), ("long", 8)))
    total += 30 * layers["mlp"]["both_ms"]
    assert record["blocks"]["kernel"]["both_ms"] == pytest.approx(total)
    for name in ("turned", "value"):
        assert 0 < parts[f"{name} kernel"]["error_to_fp32"] < 1e-5
        unit = 2 * 16 * 32 * 4  # bytes of the heads of all tokens
        assert parts[f"{name} kernel"]["forward_bytes"] == 3 * unit
    assert all("need a GPU" in row["error"] for row in record["launches"].values())


def test_what_is_past_the_limit_is_left_out_by_name(tmp_path: Path) -> None:
    record, _ = run(tmp_path, "--limit-s", "0")
    assert record["layers"]["short plain"] == {"error": "left out: past --limit-s"}
    assert record["blocks"] == {}
