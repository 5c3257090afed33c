"""A trial whose worker is killed goes on where it was saved, with real workers of both runners."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.run import Run
from service.runners.base import Demand, RunState, Update
from service.runners.local_runner import LocalRunner, processes_with
from service.runners.ray_cluster import connect
from service.runners.ray_runner import RayRunner
from tests.service_tests.runner_trials import Ended, make_spec, poll_to_end, run_to_end, wait_until
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.resume import FILE

STEPS = 40


def spec_of(folder: Path, number: int) -> Any:
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
        "evaluate__prequant": False,
        "schedule__progress": "steps",
        "budget__train_seconds": None,
        "runtime__log_every": 1,
        "runtime__prime_steps": 1,
        "runtime__checkpoint_seconds": 1e-9,
        "optim__muon_comm": "reduce_scatter",
    }
    return make_spec(folder, number, steps=STEPS, **settings)


def losses(ended: Ended) -> dict[int, float]:
    return {event["step"]: event["train_loss"] for event in ended.of_kind("step")}


def check_same_end(whole: Ended, again: Ended) -> None:
    """The second run went on from the middle and ended as the first."""
    assert again.state is RunState.FINISHED, again.update.error
    assert whole.update.result is not None and again.update.result is not None
    assert again.update.result.artifact_sha256 == whole.update.result.artifact_sha256
    assert again.update.result.val_bpb == whole.update.result.val_bpb
    found, expected = losses(again), losses(whole)
    assert 1 not in found and STEPS in found  # it did not start anew
    assert found == {step: loss for step, loss in expected.items() if step in found}


def check_clock(again: Ended) -> None:
    """Each second counted once: those saved, then those of the steps of this attempt."""
    assert again.update.result is not None
    saved = again.of_kind("saved")[0]
    own_s = sum(event["step_ms"] for event in again.of_kind("step")) / 1000
    train_s = again.update.result.phases["train"]
    assert saved["step"] > 0
    assert train_s == pytest.approx(saved["elapsed_s"] + own_s, abs=0.1)


@pytest.mark.slow
def test_a_killed_rank_under_torchrun(tmp_path: Path) -> None:
    runner = LocalRunner(num_cpus=2)
    demand = Demand(workers=2)
    try:
        whole = run_to_end(runner, spec_of(tmp_path, 0), demand)
        lost = spec_of(tmp_path, 1)
        runner.submit(lost, demand)

        def kill_one(update: Update) -> None:
            if any(event["kind"] == "step" and event["step"] > 5 for event in update.events):
                processes = list(processes_with(runner._trials[1].token))
                ranks = [p for p in processes if p.pid != runner._trials[1].launcher.pid]
                os.kill(max(ranks, key=lambda p: int(p.environ()["RANK"])).pid, signal.SIGKILL)

        ended = poll_to_end(runner, 1, kill_one)
        assert ended.state is RunState.FAILED
        assert (lost.folder / FILE).exists()
        again = run_to_end(runner, replace(lost, attempt=2), demand)
        check_same_end(whole, again)
        assert not (lost.folder / FILE).exists()
    finally:
        runner.close()


@pytest.mark.slow
def test_a_killed_worker_on_ray(tmp_path: Path) -> None:
    connection = connect(num_cpus=2)
    runner = RayRunner()
    demand = Demand(workers=1)
    try:
        whole = run_to_end(runner, spec_of(tmp_path, 0), demand)
        lost = spec_of(tmp_path, 1)
        runner.submit(lost, demand)

        def kill_it(update: Update) -> None:
            if any(event["kind"] == "step" and event["step"] > 5 for event in update.events):
                (worker,) = runner._trials[1].workers.values()
                if psutil.pid_exists(worker.pid):
                    os.kill(worker.pid, signal.SIGKILL)

        ended = poll_to_end(runner, 1, kill_it)
        assert ended.state is RunState.FAILED
        again = run_to_end(runner, replace(lost, attempt=2), demand)
        check_same_end(whole, again)
        check_clock(again)
        wait_until(lambda: not (lost.folder / "ray").exists())
    finally:
        runner.close()
        connection.disconnect()


def test_only_training_that_was_not_saved_is_lost(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, 0)
    run = Run(spec, trial=None)  # type: ignore[arg-type]

    def step(seconds: float) -> dict[str, Any]:
        return {"kind": "step", "time": seconds, "elapsed_s": seconds, "train_loss": 1.0}

    saved = {"kind": "saved", "time": 4.0, "step": 4, "elapsed_s": 4.0}
    run.hear(Update(RunState.RUNNING, [step(3.0)]))
    assert run.lost_s == 3.0
    run.hear(Update(RunState.RUNNING, [saved]))
    assert run.lost_s == 0.0
    run.hear(Update(RunState.RUNNING, [step(6.5)]))
    assert run.lost_s == 2.5
