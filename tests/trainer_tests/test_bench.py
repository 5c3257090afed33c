"""`python -m benchmarks`: figures that agree with one another, and failures that are told. CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.throughput import StepWatch, config_of, flops_per_step_token
from trainer.account import flops_per_token
from trainer.mix import lanes_of

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_figures_of_a_recipe_agree(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--recipes", "tiny", "--seconds", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] != "absent"
    row = record["recipes"]["tiny"]
    config = config_of("tiny", [], 2.0)
    (phase,) = row["phases"]
    assert phase["tokens_per_s"] * phase["step_ms"] == pytest.approx(
        1000 * config.data.batch_tokens
    )
    flops = flops_per_token(config.model, config.data.seq_len)
    assert phase["flops_per_token"] == pytest.approx(flops)
    assert phase["model_flops_utilisation"] == pytest.approx(
        flops * phase["tokens_per_s"] / row["rooflines"]["matrix_flops"]
    )
    assert phase["floor_ms_of_products"] == pytest.approx(
        phase["step_ms"] * phase["model_flops_utilisation"]
    )
    assert 0 < phase["model_flops_utilisation"] < 1.5  # other processes share this machine
    assert "pack" not in row["seconds"], "stopped before the end: nothing is packed"
    assert "utilisation" in done.stdout


def test_a_recipe_that_fails_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--recipes", "tiny", "--seconds", "1", "--data", "/nowhere", "--out", str(out))
    assert done.returncode == 1 and "no such data folder" in done.stderr
    assert json.loads(out.read_text())["recipes"]["tiny"] == {"failed": "exit code 1"}


def test_flops_follow_the_visits_of_the_phase() -> None:
    config = config_of("pr1894", [], 60.0)
    before, after = (flops_per_step_token(config, progress) for progress in (0.0, 0.5))
    width, kv_width, hidden = 512, 256, 2048
    block = 2 * width * width + 2 * kv_width * width + 2 * width * hidden
    keys = (config.data.seq_len + 1) / 2
    # three blocks twice more
    assert after - before == pytest.approx(6 * (6 * block + 12 * width * keys))
    assert after == pytest.approx(flops_per_token(config.model, 2048))


def test_flops_of_a_mix_are_those_of_its_rows() -> None:
    config = config_of("pr1212", [], 60.0)
    tokens = {lane.seq_len: 0 for lane in lanes_of(config.data)}
    for lane in lanes_of(config.data):
        tokens[lane.seq_len] += lane.num_tokens
    assert sorted(tokens) == [2048, 6144]
    total = sum(count * flops_per_token(config.model, length) for length, count in tokens.items())
    assert flops_per_step_token(config, 0.3) == pytest.approx(total / sum(tokens.values()))


def test_steps_are_told_apart_by_phase() -> None:
    config = config_of("pr1894", [], 10.0)
    watch = StepWatch(10.0)
    for place in range(1, 11):
        ms = 700.0 if place <= 5 else 1000.0
        watch.emit("step", step_ms=ms, progress=place / 10, elapsed_s=place)
        assert (watch.stop_requested() is not None) == (place >= 10)
    # 0.42 lies behind the fifth step; three of each phase are left out
    assert watch.by_phase(config) == [(0.0, [700.0, 700.0]), (0.42, [1000.0, 1000.0])]
