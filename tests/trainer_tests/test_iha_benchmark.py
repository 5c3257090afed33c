"""The benchmark of interleaved heads runs here at a tiny size and saves what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.iha_training import limits, summarize
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer.config import parse_overrides
from trainer.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.vocab_size": VOCAB_SIZE,
    "model.padded_vocab": 0,
    "model.model_dim": 16,
    "model.mlp_mult": 2.0,
    "model.window": 8,
    "data.seq_len": 16,
    "evaluate.seq_len": 16,
}


def bench(out: Path, *words: str, **settings: object) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "benchmarks.iha", *words, "--recipe", "slowrun_cpu"]
    for name, value in (SMALL | settings).items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.read_text()), done.stdout


def test_every_variant_is_timed_beside_the_plain_one(tmp_path: Path) -> None:
    record, printed = bench(
        tmp_path / "results" / "iha.json", "pass", "--rows", "2", "--repeats", "3"
    )
    rows = record["rows"]
    assert [row["error"] for row in rows] == [None] * 6
    by_name = {row["variant"]: row for row in rows}
    extra = {name: row["parameters"] - rows[0]["parameters"] for name, row in by_name.items()}
    assert extra["fused"] == 7 * 3 * 2 * 2 and extra["interleaved"] == 7 * (3 * 2 * 2 * 2 + 4)
    assert by_name["no-op start"]["flops_per_token"] > rows[0]["flops_per_token"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms"] / rows[0]["ms"])
        assert f"{row['ratio']:.3f}" in printed


def test_whole_runs_of_every_variant_and_seed_come_to_one_table(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(4, 16, 4000).astype(np.uint16)
    data = write_folder(tmp_path / "data", tokens[:3000], tokens[3000:], tokens_per_shard=3000)
    words = ["train", "--data", str(data), "--equal", "epochs", "--steps", "4", "--parallel", "2"]
    small = {
        "data.batch_tokens": 128,
        "data.micro_batch_tokens": 128,
        "evaluate.batch_tokens": 256,
        "runtime.prime_steps": 0,
    }
    words += ["--seeds", "5", "--variants", "plain", "interleaved"]
    record, printed = bench(tmp_path / "runs.json", *words, **small)
    assert {(row["variant"], row["seed"]) for row in record["rows"]} == {
        ("plain", 5),
        ("interleaved", 5),
    }
    losses = {row["variant"]: row["result"]["val_loss"] for row in record["rows"]}
    assert losses["plain"] != losses["interleaved"]
    for name, row in record["summary"].items():
        assert (row["val_loss"], row["steps"]) == (losses[name], 4)
        assert set(row["ensemble"]) == {"ensemble_equal", "ensemble_weighted"}
        assert f"{row['val_loss']:.4f}" in printed


@pytest.mark.parametrize("equal", ["time", "epochs"])
def test_equal_time_follows_the_clock_and_equal_epochs_the_steps(equal: str) -> None:
    pairs = limits(Namespace(equal=equal, seconds=33.0, steps=7))
    config = RECIPES["slowrun_gpu"].build().with_overrides(parse_overrides(pairs))
    clock, steps = ("clock", 33.0, None), ("steps", None, 7)
    budget = config.budget
    got = (config.schedule.progress, budget.train_seconds, budget.max_steps)
    assert got == (clock if equal == "time" else steps)


def test_the_summary_is_over_the_seeds_that_ended() -> None:
    def row(variant: str, nats: float) -> dict[str, Any]:
        result = {"val_loss": nats, "val_bpb": 1.0, "steps": 4, "tokens": 8, "step_ms": 2.0}
        return {"variant": variant, "result": {**result, "ensemble": {"ensemble_equal": nats}}}

    failed = {"variant": "fused", "exit_code": 1}
    summary = summarize([row("plain", 3.0), failed, row("plain", 4.0), row("interleaved", 2.0)])
    assert list(summary) == ["plain", "interleaved"]
    plain = summary["plain"]
    assert (plain["seeds"], plain["val_loss"], plain["ensemble"]) == (
        2,
        3.5,
        {"ensemble_equal": 3.5},
    )
    assert plain["val_loss_std"] == pytest.approx(0.5**0.5)
