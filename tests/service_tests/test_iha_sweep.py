"""The space of interleaved heads, swept through a real Ray on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import main
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder

TINY = {
    "model.vocab_size": VOCAB_SIZE,
    "model.num_layers": 3,
    "model.model_dim": 32,
    "data.seq_len": 64,
    "data.batch_tokens": 256,
    "data.micro_batch_tokens": 256,
    "evaluate.seq_len": 64,
    "evaluate.prequant": "false",
    "schedule.progress": "steps",
    "budget.max_steps": 3,
    "budget.min_steps": 0,
    "runtime.prime_steps": 0,
}


@pytest.mark.ray
@pytest.mark.slow
def test_plain_fused_and_interleaved_heads_are_swept_on_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", random_tokens(3_000), random_tokens(1_000, 1))
    command = ["sweep", "run", "iha", "--runner", "ray", "--trials", "4", "--json"]
    command += ["--out", str(tmp_path / "runs"), "--data", str(data)]
    for path, value in TINY.items():
        command += ["--set", f"{path}={value}"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["states"]["COMPLETE"] == answer["feasible"] == 4
    results = []
    for number, kind in enumerate(("off", "off", "fused", "interleaved")):
        folder = tmp_path / "runs" / "iha" / f"trial-{number:05}"
        assert json.loads((folder / "config.json").read_text())["model"]["iha"] == kind
        results.append(json.loads((folder / "result.json").read_text()))
    plain, short, fused, interleaved = results
    # Of three layers of four heads: M for q, k and v, or A for each and R, with P = 2.
    assert fused["num_params"] - plain["num_params"] == 3 * 3 * 4 * 4
    assert interleaved["num_params"] - plain["num_params"] == 3 * (3 * 4 * 4 * 2 + 4 * 2)
    assert len({result["val_loss"] for result in (plain, fused, interleaved)}) == 3
    assert short["num_params"] == plain["num_params"]
