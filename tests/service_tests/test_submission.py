"""A submission folder: complete, and its script scores its model as the trial did. CPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import UsageError
from service.submission import SeedRun, read_run, write_submission
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.report import FileReporter


@pytest.fixture
def run(configure: Callable[..., TrainConfig], tmp_path: Path) -> SeedRun:  # noqa: F811
    """The folder that a trial leaves."""
    folder = tmp_path / "trial-00000"
    config = configure(**{"budget.max_steps": 3, "runtime.prime_steps": 0})
    result = train(config, FileReporter(folder), folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "result.json").write_text(result.model_dump_json())
    return read_run(folder)


def test_the_folder_is_complete_and_its_script_alone_scores_its_model(
    run: SeedRun, tmp_path: Path
) -> None:
    out = tmp_path / "submission"
    written = write_submission([run], out, "smoke trial 0", "laptop")
    document = json.loads((out / "submission.json").read_text())
    assert document == json.loads(json.dumps(written))
    assert document["bytes_code"] == (out / "train_gpt.py").stat().st_size
    assert document["bytes_model"] == (out / "artifact.bin").stat().st_size
    assert document["bytes_total"] == document["bytes_code"] + document["bytes_model"]
    assert (out / f"train_seed{run.seed}.log").read_text()
    assert "dir" not in document["config"].get("data", {})
    done = subprocess.run(
        [
            *(sys.executable, "-I", "train_gpt.py", "--data", run.config.data.dir),
            *("--out", str(tmp_path), "--artifact", "artifact.bin"),
        ],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scored = json.loads((tmp_path / "result.json").read_text())
    assert scored["steps"] == 0
    assert scored["val_bpb"] == pytest.approx(document["val_bpb"], abs=1e-6)
    assert scored["artifact_digest"] == document["artifact_digest"]
    assert (
        scored["artifact_sha256"] == hashlib.sha256((out / "artifact.bin").read_bytes()).hexdigest()
    )


def test_a_changed_model_and_a_full_folder_are_refused(run: SeedRun, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty; give another --out"):
        write_submission([run], tmp_path, "x", "laptop")
    blob = bytearray((run.folder / "artifact.bin").read_bytes())
    blob[100] ^= 1
    (run.folder / "artifact.bin").write_bytes(blob)
    with pytest.raises(UsageError, match="not the file that the run scored"):
        write_submission([run], tmp_path / "new", "x", "laptop")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match=r"no result\.json"):
        read_run(tmp_path)
