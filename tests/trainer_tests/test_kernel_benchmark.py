"""The benchmark of kernels runs here on few rows, and outlives a kernel that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernels

CANDIDATES = {"norm and MLP": 5, "norm and matrix": 2, "cross-entropy": 2}


def test_every_candidate_is_checked_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("no such luck")

    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(kernels, "_fused_loss", broken)
    monkeypatch.setattr(kernels, "norm_linear", wrong)
    out = tmp_path / "results" / "kernels.json"
    monkeypatch.setattr(
        sys, "argv", ["kernels", "--out", str(out), "--shrink", "4096", "--repeats", "2"]
    )
    kernels.main()
    record = json.loads(out.read_text())
    names = [row["case"] for row in record["rows"]]
    assert all(names.count(case) == 2 * count for case, count in CANDIDATES.items())
    assert record["versions"]["torch"] and record["ceilings"]["flops_per_s"] > 0
    printed = capsys.readouterr().out
    for row in record["rows"]:
        if row["case"] == "cross-entropy" and row["candidate"] == "fused":
            assert row["error_message"] == "RuntimeError: no such luck"
            continue
        assert row["right"] == ((row["case"], row["candidate"]) != ("norm and matrix", "fused"))
        assert f"{row['both_ms']:8.3f} ms" in printed
        rows = row["shape"][0] // 4096
        if row["case"] == "norm and matrix":
            assert row["forward_flops"] == 2 * rows * row["shape"][1] * row["shape"][2]
    assert printed.count("WRONG") == 2
    assert "need a GPU" in record["tiles"][0]["error_message"]
