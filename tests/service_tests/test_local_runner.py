"""The local runner with real torchrun processes, and once with the real trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import RunnerError
from service.runners.base import Demand, RunState, Update
from service.runners.local_runner import TOKEN, LocalRunner, processes_with
from service.trial import TrialFolder
from tests.service_tests.runner_trials import (
    make_spec,
    poll_to_end,
    poll_until_running,
    run_to_end,
    wait_until,
)
from tests.service_tests.stand_in_train import ARTIFACT
from tests.trainer_tests.small_data import VOCAB_SIZE, write_tokenizer
from trainer.data.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = Demand(workers=1), Demand(workers=2)
STEPS, BAD_SETTING, NO_DEVICE_MEMORY, KILLED = 1, 2, 3, 4


@pytest.fixture
def runner() -> Iterator[LocalRunner]:
    runner = LocalRunner(num_cpus=2, module="tests.service_tests.stand_in_trainer")
    yield runner
    runner.close()


def test_slots_count_whole_gpus_and_running_trials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    runner = LocalRunner(num_cpus=4)
    assert runner.total_slots(Demand(1, gpus_per_worker=1)) == 3
    assert runner.total_slots(Demand(2, gpus_per_worker=1)) == 1
    assert runner.total_slots(Demand(4, gpus_per_worker=1)) == 0
    assert runner.total_slots(Demand(1, gpus_per_worker=0.5)) == 0
    assert runner.total_slots(Demand(1, cpus_per_worker=0.5)) == 8
    assert LocalRunner(num_cpus=4, num_gpus=2).total_slots(Demand(1, gpus_per_worker=1)) == 2
    with pytest.raises(RunnerError, match=r"4 workers of 1 CPU and 1 GPU .* has 4 CPU and 3 GPU"):
        runner.submit(make_spec(tmp_path, 0), Demand(4, gpus_per_worker=1))


def test_each_trial_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    runner = LocalRunner(num_cpus=4, module="tests.service_tests.stand_in_trainer")
    try:
        seen = []
        for number in (0, 1):
            runner.submit(
                make_spec(tmp_path, number, steps=10_000, runtime__seed=STEPS), Demand(1, 1)
            )
            trial = runner._trials[number]
            wait_until(lambda token=trial.token: list(processes_with(token)))
            (process,) = processes_with(trial.token)
            seen.append(process.environ()["CUDA_VISIBLE_DEVICES"])
        assert seen == ["0", "1"]
        assert runner.free_slots(Demand(1, 1)) == 1
    finally:
        runner.close()


def test_a_trial_ends_with_its_files_and_every_record(runner: LocalRunner, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, 0, steps=20, runtime__seed=STEPS)
    (spec.folder / "metrics.jsonl").write_text('{"kind": "log", "line": "of an earlier attempt"}\n')
    slots = set()

    def look(update: Update) -> None:
        slots.add(runner.free_slots(ONE))

    ended = run_to_end(runner, spec, TWO, look)
    assert ended.state is RunState.FINISHED, ended.update.error
    result = ended.update.result
    assert result is not None and (result.steps, result.world_size) == (20, 2)
    assert result.train_loss == pytest.approx(20 * 3.0)  # ranks 0 and 1 each gave their part
    assert [event["step"] for event in ended.of_kind("step")] == list(range(1, 21))
    assert RunState.RUNNING in ended.states and slots == {0, 2}
    folder = TrialFolder(spec.folder)
    assert folder.artifact.read_bytes() == ARTIFACT
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == ended.events
    assert "of an earlier attempt" not in folder.log.read_text()
    with pytest.raises(RunnerError, match="not running here"):
        runner.poll(0)


def test_a_stop_keeps_its_reason(runner: LocalRunner, tmp_path: Path) -> None:
    def stop(update: Update) -> None:
        if update.state is RunState.RUNNING:
            runner.request_stop(0, "too few steps")

    spec = make_spec(tmp_path, 0, steps=10_000, runtime__seed=STEPS)
    ended = run_to_end(runner, spec, TWO, stop)
    assert ended.state is RunState.FINISHED, ended.update.error
    result = ended.update.result
    assert result is not None
    assert (result.status, result.stop_reason) == ("stopped", "too few steps")
    assert result.steps < 10_000


def test_cancel_ends_ranks_that_torchrun_put_out_of_reach(
    runner: LocalRunner, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, 0, steps=10_000, runtime__seed=STEPS)
    runner.submit(spec, TWO)
    poll_until_running(runner, 0)
    trial = runner._trials[0]
    processes = list(processes_with(trial.token))
    assert len(processes) == 3  # torchrun and two ranks
    assert len({os.getsid(process.pid) for process in processes}) == 3
    trial.launcher.kill()  # the worst case: nobody is left to end the ranks
    runner.cancel(0)
    assert runner.free_slots(TWO) == 0
    wait_until(lambda: runner.free_slots(TWO) == 1)
    assert list(processes_with(trial.token)) == []


@pytest.mark.parametrize(
    ("seed", "state", "text"),
    [
        (BAD_SETTING, RunState.FAILED, "model.num_layers = 0: give at least one\n"),
        (NO_DEVICE_MEMORY, RunState.OUT_OF_MEMORY, "Tried to allocate 20.00 GiB"),
        (KILLED, RunState.FAILED, "Signal 9 (SIGKILL)"),
    ],
)
def test_errors_say_what_the_ranks_said(
    runner: LocalRunner, tmp_path: Path, seed: int, state: RunState, text: str
) -> None:
    spec = make_spec(tmp_path, 0, runtime__seed=seed)
    ended = run_to_end(runner, spec, TWO)
    assert ended.state is state
    error = str(ended.update.error)
    assert text in error
    assert str(spec.folder / "train.log") in error and spec.config.digest() in error
    if seed == BAD_SETTING:
        assert error.startswith(text)
    assert runner.free_slots(TWO) == 1


DRIVER = """
import sys, time
from pathlib import Path
from service.runners.base import Demand
from service.runners.local_runner import LocalRunner
from tests.service_tests.runner_trials import make_spec, poll_until_running

runner = LocalRunner(num_cpus=2, module="tests.service_tests.stand_in_trainer")
runner.submit(make_spec(Path(sys.argv[1]), 0, steps=10**6, runtime__seed=1), Demand(workers=2))
poll_until_running(runner, 0)
print(runner._trials[0].token, flush=True)
time.sleep(600)
"""


def test_a_killed_driver_takes_its_trials_along(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert driver.stdout is not None
    token = driver.stdout.readline().decode().strip()
    assert token and TOKEN not in os.environ
    assert len(list(processes_with(token))) == 3
    driver.kill()
    driver.wait()
    wait_until(lambda: not list(processes_with(token)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_real_trainer(tmp_path: Path, workers: int) -> None:
    data = tmp_path / "data"
    text = tmp_path / "text.txt"
    text.write_text("\0".join(path.read_text() for path in sorted((ROOT / "trainer").glob("*.py"))))
    prepare([text], VOCAB_SIZE, data, write_tokenizer(tmp_path / "tokenizer"))
    settings: dict[str, Any] = {
        "model__vocab_size": VOCAB_SIZE,
        "data__dir": str(data),
        "schedule__progress": "steps",
        "budget__train_seconds": None,
        "runtime__log_every": 1,
    }
    runner = LocalRunner(num_cpus=2)
    try:
        spec = make_spec(tmp_path, 0, steps=8, **settings)
        runner.submit(spec, Demand(workers))
        ended = poll_to_end(runner, 0)
    finally:
        runner.close()
    result = ended.update.result
    assert result is not None, ended.update.error
    assert (result.status, result.steps, result.world_size) == ("finished", 8, workers)
    assert result.bytes_model == TrialFolder(spec.folder).artifact.stat().st_size
    assert result.val_bpb is not None and 0 < result.val_bpb < 12
    assert ended.of_kind("step")[-1]["train_loss"] == result.train_loss
