"""Gangs that stay: what one trial leaves to the next, and what becomes of gangs, on a real Ray.

Whether a trial is what it would be in processes of its own is asked of the real train function.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from service.runners.base import Demand, RunState
from service.runners.ray_cluster import connect
from service.runners.ray_runner import RayRunner
from service.trial import TrialSpec
from tests.service_tests.runner_trials import (
    Ended,
    make_spec,
    poll_to_end,
    poll_until_running,
    run_to_end,
    wait_until,
)
from tests.service_tests.stand_in_train import ENDLESS, HOARD, KILLED, POISON
from tests.service_tests.test_ray_runner import ROOT, leftovers, processes_marked
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder

TRAIN = "tests.service_tests.stand_in_train:train_or_harm"
ONE, TWO = Demand(workers=1), Demand(workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    connection = connect(num_cpus=2)
    yield
    connection.disconnect()


@pytest.fixture
def make_runner(cluster: None) -> Iterator[Any]:
    runners = []

    def make(isolation: Any = "resident", trials_per_gang: int = 50) -> RayRunner:
        runners.append(RayRunner(None, None, None, TRAIN, isolation, trials_per_gang))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()
    assert leftovers() == []


def spec_of(folder: Path, number: int, seed: int = 5, **overrides: Any) -> TrialSpec:
    """A run of some steps that has a score."""
    data = folder / "data"
    if not data.exists():
        write_folder(data, random_tokens(20_000), random_tokens(2_000, 1))
    settings: dict[str, Any] = {
        "model__vocab_size": VOCAB_SIZE,
        "model__model_dim": 32,
        "data__dir": str(data),
        "data__seq_len": 32,
        "data__batch_tokens": 512,
        "data__micro_batch_tokens": 256,
        "evaluate__seq_len": 32,
        "schedule__progress": "steps",
        "budget__train_seconds": None,
        "runtime__log_every": 1,
        "runtime__prime_steps": 1,
        "runtime__seed": seed,
        **overrides,
    }
    return make_spec(folder, number, steps=12, **settings)


def pids(runner: RayRunner, number: int) -> set[int]:
    trial = runner._trials.get(number)
    return {worker.pid for worker in trial.workers.values()} if trial else set()


def end_with_pids(runner: RayRunner, spec: TrialSpec, demand: Demand) -> tuple[Ended, set[int]]:
    found: set[int] = set()
    ended = run_to_end(runner, spec, demand, lambda update: found.update(pids(runner, spec.number)))
    return ended, found


def numbers(ended: Ended) -> tuple[Any, ...]:
    """What a trial came to, without times."""
    result = ended.update.result
    assert ended.state is RunState.FINISHED and result is not None, ended.update.error
    losses = [event["train_loss"] for event in ended.of_kind("step")]
    return losses, result.val_loss, result.val_bpb, result.artifact_sha256, result.num_params


def gangs(runner: RayRunner) -> list[Any]:
    return list(runner._pool._gangs.values())


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_after_a_poisoned_one_is_bit_for_bit_that_of_a_fresh_process(
    make_runner: Any, tmp_path: Path
) -> None:
    apart = make_runner("trial")
    fresh, _ = end_with_pids(apart, spec_of(tmp_path, 0), TWO)
    apart.close()
    runner = make_runner()
    first, one = end_with_pids(runner, spec_of(tmp_path, 1), TWO)
    other = {"model__num_layers": 3, "optim__matrix_lr": 0.1}
    poisoned, two = end_with_pids(runner, spec_of(tmp_path, 2, POISON, **other), TWO)
    second, three = end_with_pids(runner, spec_of(tmp_path, 3), TWO)
    assert one == two == three and len(one) == 2  # the same processes
    assert numbers(poisoned)[0] != numbers(fresh)[0]
    assert numbers(first) == numbers(fresh)
    assert numbers(second) == numbers(fresh)
    assert (tmp_path / "3" / "artifact.bin").read_bytes() == (
        tmp_path / "0" / "artifact.bin"
    ).read_bytes()
    log = (tmp_path / "3" / "train.log").read_text().splitlines()
    assert len(log) == len((tmp_path / "0" / "train.log").read_text().splitlines())


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_fails_its_trial_alone_and_memory_kept_ends_the_gang(
    make_runner: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner()
    _, one = end_with_pids(runner, spec_of(tmp_path, 0), TWO)
    killed, two = end_with_pids(runner, spec_of(tmp_path, 1, KILLED), TWO)
    assert two == one
    assert killed.state is RunState.FAILED
    assert str(killed.update.error).startswith("rank 1 (pid ")
    log = (tmp_path / "1" / "train.log").read_text()
    assert log.startswith("before the kill\n") and "study/1, attempt 1" in log

    hoarded, three = end_with_pids(runner, spec_of(tmp_path, 2, HOARD), TWO)
    assert hoarded.state is RunState.FINISHED  # what it kept is no fault of its result
    assert len(three) == 2 and not three & one
    wait_until(lambda: not gangs(runner))
    assert re.search(r"tensors with 4,\d{3},\d{3} bytes are still held", caplog.text)
    good, four = end_with_pids(runner, spec_of(tmp_path, 3), TWO)
    assert good.state is RunState.FINISHED and not four & three


@pytest.mark.ray
@pytest.mark.slow
def test_gangs_stop_end_after_their_last_trial_and_make_room_for_others(
    make_runner: Any, tmp_path: Path
) -> None:
    runner = make_runner(trials_per_gang=2)
    endless = spec_of(tmp_path, 0, ENDLESS).config.with_overrides({"budget.max_steps": 5000})
    runner.submit(replace(spec_of(tmp_path, 0), config=endless), TWO)
    poll_until_running(runner, 0)
    assert (runner.free_slots(ONE), runner.free_slots(TWO)) == (0, 0)
    one = pids(runner, 0)
    runner.request_stop(0, "the loss diverged")
    stopped = poll_to_end(runner, 0)
    assert stopped.update.result is not None
    assert stopped.update.result.stop_reason == "the loss diverged"
    wait_until(lambda: runner.free_slots(TWO) == 1)
    assert runner.free_slots(ONE) == 2  # an idle gang counts as room
    _, two = end_with_pids(runner, spec_of(tmp_path, 1), TWO)
    assert two == one
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in one))  # it was its last

    _, three = end_with_pids(runner, spec_of(tmp_path, 2), ONE)
    wait_until(lambda: runner.free_slots(TWO) == 1)
    assert len(gangs(runner)) == 1 and all(psutil.pid_exists(pid) for pid in three)
    _, four = end_with_pids(runner, spec_of(tmp_path, 3), TWO)  # needs both CPUs
    assert len(four) == 2 and not any(psutil.pid_exists(pid) for pid in three)


@pytest.mark.ray
@pytest.mark.slow
def test_what_dies_between_two_trials_costs_no_attempt(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner()
    _, one = end_with_pids(runner, spec_of(tmp_path, 0), TWO)
    wait_until(lambda: runner.free_slots(TWO) == 1)
    ray.kill(runner._mailbox, no_restart=False)
    ended, two = end_with_pids(runner, spec_of(tmp_path, 1), TWO)
    assert ended.state is RunState.FINISHED, ended.update.error
    assert two == one  # waited through the restart
    wait_until(lambda: runner.free_slots(TWO) == 1)
    os.kill(min(two), signal.SIGKILL)
    ended, three = end_with_pids(runner, spec_of(tmp_path, 2), TWO)
    assert ended.state is RunState.FINISHED, ended.update.error
    assert len(three) >= 2 and not three & {min(two)}


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "CADDIE_TEST_MARK": str(tmp_path)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    spec_of(tmp_path, 0)
    command = [sys.executable, "-m", "service.cli", "sweep", "run", "smoke", "--trials", "40"]
    command += ["--isolation", "resident", "--out", str(tmp_path / "runs")]
    for name, value in (
        ("data.dir", tmp_path / "data"),
        ("model.vocab_size", VOCAB_SIZE),
        ("data.seq_len", 32),
        ("evaluate.seq_len", 32),
        ("budget.train_seconds", 1.0),
    ):
        command += ["--set", f"{name}={value}"]
    sweep = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    results = tmp_path / "runs" / "smoke"
    try:
        wait_until(lambda: len(list(results.glob("trial-*/result.json"))) > 1)
        assert len(processes_marked(str(tmp_path))) > 5
        sweep.send_signal(signal.SIGINT)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(60) == 0, sweep.communicate()[1].decode()
        wait_until(lambda: not processes_marked(str(tmp_path)))
    finally:
        sweep.kill()
        sweep.wait()
        assert sweep.stderr is not None
        sweep.stderr.close()
