"""`caddie sweep` as processes that are interrupted and killed: nothing is lost, doubled or left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from service.cli import main
from tests.trainer_tests.small_recipes import SMALL
from trainer.data.demo_corpus import build_demo

ROOT = Path(__file__).parents[2]
QUICK = (
    *("--set", "budget.train_seconds=1.5", "--set", "budget.min_steps=0"),
    *("--set", "runtime.prime_steps=0", "--set", "runtime.log_every=1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    build_demo(folder)
    return folder


def start_sweep(out: Path, data: Path, trials: int, *more: str) -> subprocess.Popen[str]:
    """A real sweep through torchrun, one trial at a time on one processor."""
    command = [sys.executable, "-m", "service.cli", "sweep", "run", "smoke", "--runner", "local"]
    command += ["--trials", str(trials), "--out", str(out), "--data", str(data), *QUICK, *more]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=(out.parent / "sweep.log").open("a"),
        text=True,
    )


def wait_for_steps(out: Path, process: subprocess.Popen[str]) -> None:
    """Until some trial has done a step."""
    deadline = time.monotonic() + 120
    while not any('"step"' in file.read_text() for file in out.glob("smoke/trial-*/metrics.jsonl")):
        assert process.poll() is None, (out.parent / "sweep.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []


def finish(out: Path, data: Path, trials: int) -> dict[str, Any]:
    process = start_sweep(out, data, trials, "--json")
    answer, _ = process.communicate(timeout=280)
    assert process.returncode == 0, (out.parent / "sweep.log").read_text()
    return json.loads(answer)  # type: ignore[no-any-return]


def assert_each_told_and_mirrored_once(out: Path, trials: int) -> None:
    study = optuna.load_study(study_name="smoke", storage=f"sqlite:///{out}/caddie.db")
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert len(ended) == trials
    assert study.get_trials(states=(TrialState.RUNNING,)) == []
    lines = [json.loads(line) for line in (out / "smoke/trials.jsonl").read_text().splitlines()]
    assert sorted(line["number"] for line in lines) == sorted(trial.number for trial in ended)
    runs = mirrored_trials(f"sqlite:///{out}/mlflow.db")
    assert sorted(runs) == sorted(trial.number for trial in ended)


def mirrored_trials(uri: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("caddie")
    runs = client.search_runs([experiment.experiment_id])
    tags = [run.data.tags for run in runs]
    return [int(tag["caddie.trial"]) for tag in tags if "caddie.trial" in tag]


@pytest.mark.slow
def test_ctrl_c_twice_and_sigkill_leave_a_study_that_resumes(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "runs"
    process = start_sweep(out, data, 4)
    wait_for_steps(out, process)
    children = descendants(process)
    assert children
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == 0, (tmp_path / "sweep.log").read_text()
    assert_gone(children)

    process = start_sweep(out, data, 4)
    wait_for_steps(out, process)
    children = descendants(process)
    process.kill()
    process.wait()
    assert_gone(children)

    status = finish(out, data, 4)
    assert status["states"]["COMPLETE"] + status["states"]["PRUNED"] == 4
    assert status["states"]["RUNNING"] == 0 and status["driver"] is None
    assert status["rejected_before_launch"] >= 1
    assert_each_told_and_mirrored_once(out, 4)

    again = finish(out, data, 4)  # a finished study starts nothing
    assert again["states"] == status["states"]
    assert "study smoke is finished" in (tmp_path / "sweep.log").read_text()


@pytest.mark.slow
def test_ctrl_c_once_lets_the_running_trial_finish(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "runs"
    process = start_sweep(out, data, 50, "--grace", "200", "--json")
    wait_for_steps(out, process)
    children = descendants(process)
    process.send_signal(signal.SIGINT)
    answer, _ = process.communicate(timeout=250)
    assert process.returncode == 0, (tmp_path / "sweep.log").read_text()
    assert_gone(children)
    status = json.loads(answer)
    assert status["states"]["RUNNING"] == status["states"]["FAIL"] == 0
    study = optuna.load_study(study_name="smoke", storage=f"sqlite:///{out}/caddie.db")
    finished = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert any((out / f"smoke/trial-{t.number:05d}/result.json").exists() for t in finished)
    assert all("wasted_s" not in trial.user_attrs for trial in finished), "nothing was cut short"


@pytest.mark.slow
def test_stop_from_another_process_lets_the_running_trial_finish(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    process = start_sweep(out, data, 50, "--json")
    wait_for_steps(out, process)
    assert main(["sweep", "stop", "smoke", "--out", str(out), "--grace", "200", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert asked["asked"] and str(process.pid) in asked["driver"]
    answer, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    status = json.loads(answer)
    assert status["states"]["RUNNING"] == 0 and status["states"]["FAIL"] == 0
    assert status["states"]["COMPLETE"] + status["states"]["PRUNED"] < 50
    assert main(["sweep", "list", "--out", str(out), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["study"] == "smoke" and listed["driver"] is None
    assert main(["sweep", "status", "smoke", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == status["states"]


def test_wrong_sweeps_touch_nothing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    where = ("--out", str(out), "--data", str(data))
    for arguments, message in (
        (["smoke", "--set", "optim.tied_embed_lr=1"], "the space smoke varies it"),
        (["smoke", "--set", "optim.matrix_lt=1"], "did you mean optim.matrix_lr"),
        (["smoke", "--runner", "slurm"], "runner = 'slurm'"),
        (["learning_rates"], "has a tokenizer of 512 pieces"),
        (["smoke", "--study", "a/b"], "cannot be the name of a folder"),
    ):
        assert main(["sweep", "run", *arguments, *where]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_unusable_storage_is_one_message(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "postgresql://me:secret@127.0.0.1:1/none"
    where = ("--out", str(tmp_path / "runs"), "--data", str(data), "--storage", url)
    assert main(["sweep", "run", "smoke", *where]) == 1
    message = capsys.readouterr().err
    assert "cannot use the storage" in message and "secret" not in message


SMALL_PR1212: dict[str, object] = {
    "model.vocab_size": 512,
    "model.num_layers": 4,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.mlp_mult": 1.0,
    "model.backout_layer": 2,
    "model.bigram_buckets": 64,
    "model.bigram_dim": 8,
    "model.value_embed_dim": 8,
    "model.value_embed_layers": "1,3",
    "model.xsa_last_n": 2,
    "model.rope_dims": 4,
    "data.batch_tokens": 8 * 6144,
    "schedule.progress": "steps",
    "budget.max_steps": 2,
    "quantize.calibration_tokens": 6144,
    "quantize.keep_float_max_numel": 128,
    "evaluate.prequant": False,
    "evaluate.batch_tokens": 6144,
    "runtime.prime_steps": 0,
}


@pytest.mark.slow
def test_windows_and_mixes_are_swept_on_a_small_pr1212(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 2048 and 6144 tokens, GPTQ and all, in real trials of the real space."""
    command = ["sweep", "run", "window_x_mix", "--runner", "local", "--trials", "2", "--json"]
    command += ["--out", str(tmp_path / "runs"), "--data", str(data)]
    for path, value in SMALL_PR1212.items():
        command += ["--set", path + "=" + (value if isinstance(value, str) else json.dumps(value))]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["states"]["COMPLETE"] == answer["feasible"] == 2
    for number, mix in enumerate(("5x2048+3x6144", "6x2048+2x6144")):
        folder = tmp_path / "runs" / "window_x_mix" / f"trial-{number:05}"
        config = json.loads((folder / "config.json").read_text())
        assert (config["data"]["mix"], config["model"]["window"]) == (mix, 512)
        assert json.loads((folder / "result.json").read_text())["phases"]["calibrate"] > 0


@pytest.mark.slow
def test_a_space_is_swept_on_another_recipe_that_is_asked_for(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small pr675, with its averaged weights and its own codec, in the space learning_rates."""
    small = SMALL["pr675"] | {"model.vocab_size": 512, "budget.max_steps": 3}
    command = ["sweep", "run", "learning_rates", "--recipe", "pr675", "--runner", "local"]
    command += ["--trials", "1", "--json"]
    command += ["--out", str(tmp_path / "runs"), "--data", str(data)]
    for path, value in {**small, "average.interval": 1, "runtime.prime_steps": 0}.items():
        command += ["--set", path + "=" + (value if isinstance(value, str) else json.dumps(value))]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["feasible"] == 1
    folder = tmp_path / "runs" / "learning_rates-pr675" / "trial-00000"
    config = json.loads((folder / "config.json").read_text())
    assert (config["average"]["kind"], config["compress"]["codec"]) == ("lawa", "lzma")
    assert main(["sweep", "run", "learning_rates", "--recipe", "pr676"]) == 2
    assert "pr675" in capsys.readouterr().err
