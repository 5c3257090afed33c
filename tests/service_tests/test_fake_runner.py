"""The fake runner keeps the contract of every runner, in its own time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.errors import RunnerError
from service.runners.base import Demand, RunState
from service.runners.fake_runner import FakeRun, FakeRunner
from service.trial import TrialFolder, TrialSpec
from trainer.recipes import RECIPES

DEMAND = Demand()
RUN = FakeRun(start_s=5, train_s=8, step_s=0.1, finish_s=2, num_records=4)


def spec_in(folder: Path, number: int = 0) -> TrialSpec:
    path = folder / str(number)
    path.mkdir(exist_ok=True)
    return TrialSpec("s", number, "tiny", {}, RECIPES["tiny"].build(), path)


def test_a_run_starts_reports_and_finishes_on_the_clock(tmp_path: Path) -> None:
    runner = FakeRunner([RUN])
    spec = spec_in(tmp_path)
    runner.submit(spec, DEMAND)
    runner.advance(4.9)
    assert runner.poll(0).state is RunState.STARTING
    runner.advance(4.1)  # 9 s after submission, 4 s into training
    update = runner.poll(0)
    assert update.state is RunState.RUNNING
    assert [event["step"] for event in update.events] == [20, 40]
    assert [event["elapsed_s"] for event in update.events] == [2.0, 4.0]
    assert runner.poll(0).events == [], "news come once"
    runner.advance(6)
    update = runner.poll(0)
    assert update.state is RunState.FINISHED
    assert update.result is not None and update.result.steps == 80
    folder = TrialFolder(spec.folder)
    assert folder.read_result() == update.result
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 60, 80]
    with pytest.raises(KeyError):
        runner.poll(0)


def test_slots_are_taken_and_freed(tmp_path: Path) -> None:
    runner = FakeRunner([RUN, RUN, RUN], slots=2)
    runner.submit(spec_in(tmp_path, 0), DEMAND)
    runner.submit(spec_in(tmp_path, 1), DEMAND)
    assert (runner.free_slots(DEMAND), runner.total_slots(DEMAND)) == (0, 2)
    with pytest.raises(RunnerError, match="s/2 cannot be placed"):
        runner.submit(spec_in(tmp_path, 2), DEMAND)
    runner.cancel(0)
    assert runner.free_slots(DEMAND) == 1
    assert not TrialFolder(tmp_path / "0").result.exists()
    runner.close()
    assert runner.free_slots(DEMAND) == 2


def test_a_stop_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    runner = FakeRunner([RUN])
    runner.submit(spec_in(tmp_path), DEMAND)
    runner.advance(9)
    runner.request_stop(0, "diverged")
    result = runner.poll(0).result
    assert result is not None
    assert (result.status, result.stop_reason, result.val_bpb) == ("stopped", "diverged", None)
    assert result.steps == 40


@pytest.mark.parametrize(
    ("oom", "state"), [(False, RunState.FAILED), (True, RunState.OUT_OF_MEMORY)]
)
def test_failures_carry_their_error(tmp_path: Path, oom: bool, state: RunState) -> None:
    runner = FakeRunner([FakeRun(fails_at_s=6, error="boom", out_of_memory=oom)])
    runner.submit(spec_in(tmp_path), DEMAND)
    runner.advance(6)
    update = runner.poll(0)
    assert (update.state, update.error) == (state, "boom")
