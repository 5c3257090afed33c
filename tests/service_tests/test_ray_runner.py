"""The Ray runner on a real Ray with real workers.

Trials run functions of stand_in_train, because what counts here is what becomes of results, errors
and processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from service.errors import RunnerError
from service.runners.base import Demand, RunState, Update
from service.runners.ray_cluster import connect, gangs_per_node
from service.runners.ray_runner import RayRunner
from service.trial import TrialFolder
from tests.service_tests.runner_trials import (
    make_spec,
    poll_to_end,
    poll_until_running,
    run_to_end,
    wait_until,
)
from tests.service_tests.stand_in_train import ARTIFACT

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "tests.service_tests.stand_in_train"
ONE, TWO = Demand(workers=1), Demand(workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """An embedded Ray of two CPUs for the whole file."""
    connection = connect(num_cpus=2)
    yield
    connection.disconnect()


@pytest.fixture
def make_runner(cluster: None) -> Iterator[Any]:
    runners = []

    def make(function: str) -> RayRunner:
        runners.append(RayRunner(train=f"{STAND_IN}:{function}"))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()
    assert leftovers() == []


def leftovers() -> list[Any]:
    """Actors and placement groups of trials."""
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return live_actors("RayTrainWorker") + live_actors("TrainController") + groups


def live_actors(kind: str) -> list[dict[str, Any]]:
    actors = ray._private.state.actors().values()
    return [a for a in actors if a["State"] != "DEAD" and kind in a["ActorClassName"]]


@pytest.mark.ray
def test_a_trial_leaves_its_result_artifact_and_every_record(
    make_runner: Any, tmp_path: Path
) -> None:
    runner = make_runner("steps")
    assert (runner.total_slots(TWO), runner.free_slots(TWO), runner.free_slots(ONE)) == (1, 1, 2)
    spec = make_spec(tmp_path, 0, steps=30)
    slots_while_running = set()

    def look(update: Update) -> None:
        if update.state is RunState.RUNNING:
            slots_while_running.add(runner.free_slots(ONE))

    ended = run_to_end(runner, spec, TWO, look)
    assert ended.state is RunState.FINISHED, ended.update.error
    result = ended.update.result
    assert result is not None and (result.steps, result.world_size) == (30, 2)
    assert result.train_loss == pytest.approx(30 * 3.0)  # ranks 0 and 1 each gave their part
    assert [event["step"] for event in ended.of_kind("step")] == list(range(1, 31))
    assert slots_while_running == {0}
    wait_until(lambda: runner.free_slots(TWO) == 1)  # Ray's own account lags a little
    folder = TrialFolder(spec.folder)
    assert folder.read_result() == result
    assert folder.artifact.read_bytes() == ARTIFACT
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == ended.events
    log = folder.log.read_text().splitlines()
    assert len(log) == 32 and log[-1] == "the last line"
    assert sorted(p.name for p in spec.folder.iterdir()) == [
        "artifact.bin",
        "metrics.jsonl",
        "result.json",
        "train.log",
    ]
    with pytest.raises(RunnerError, match="not running here"):
        runner.poll(0)


@pytest.mark.ray
def test_a_stop_reaches_all_ranks_and_a_restarted_mailbox_loses_nothing(
    make_runner: Any, tmp_path: Path
) -> None:
    runner = make_runner("steps")
    killed = []

    def interfere(update: Update) -> None:
        steps = [event["step"] for event in update.events if event["kind"] == "step"]
        if steps and not killed:
            ray.kill(runner._mailbox, no_restart=False)
            runner.request_stop(0, "the loss diverged")
            killed.append(steps[-1])

    ended = run_to_end(runner, make_spec(tmp_path, 0, steps=1000), TWO, interfere)
    assert ended.state is RunState.FINISHED, ended.update.error
    result = ended.update.result
    assert result is not None
    assert (result.status, result.stop_reason) == ("stopped", "the loss diverged")
    assert killed[0] < result.steps < 1000
    steps = [event["step"] for event in ended.of_kind("step")]
    assert steps == list(range(1, result.steps + 1))
    assert not TrialFolder(tmp_path / "0").artifact.exists()


@pytest.mark.ray
def test_cancel_frees_everything_and_forgets_the_trial(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("steps")
    spec = make_spec(tmp_path, 0, steps=10_000)
    runner.submit(spec, TWO)
    poll_until_running(runner, 0)
    pids = [actor["Pid"] for actor in live_actors("RayTrainWorker")]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RunnerError, match="runs already"):
        runner.submit(spec, TWO)
    runner.cancel(0)
    with pytest.raises(RunnerError, match="not running here"):
        runner.poll(0)
    wait_until(lambda: runner.free_slots(TWO) == 1)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert leftovers() == []
    assert not TrialFolder(spec.folder).result.exists()


@pytest.mark.ray
def test_a_cancel_before_the_workers_are_there_is_kept(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("steps")
    spec = make_spec(tmp_path, 0, steps=10_000)
    runner.submit(spec, ONE)
    runner.cancel(0)
    assert runner.free_slots(ONE) == 1
    wait_until(lambda: runner.free_slots(ONE) == 2)
    assert leftovers() == []
    assert not TrialFolder(spec.folder).metrics.exists()


@pytest.mark.ray
def test_the_first_failing_rank_explains_the_failure(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("bad_setting")
    spec = make_spec(tmp_path, 0)
    ended = run_to_end(runner, spec, TWO)
    assert ended.state is RunState.FAILED
    error = ended.update.error
    assert error is not None
    assert error.startswith("ConfigError: model.num_layers = 0: give at least one\n\non rank 1:\n")
    assert ", in bad_setting" in error
    assert str(spec.folder / "train.log") in error
    assert f"config {spec.config.digest()}" in error
    log = (spec.folder / "train.log").read_text()
    assert log.startswith("before the error\n") and error in log
    assert not (spec.folder / "result.json").exists()


@pytest.mark.ray
def test_memory_and_data_errors_of_two_trials_at_once(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("no_device_memory")
    runner.submit(make_spec(tmp_path, 0), ONE)
    runner.submit(make_spec(tmp_path, 1, data__dir=str(tmp_path / "nowhere")), ONE)
    assert runner.free_slots(ONE) == 0
    out_of_memory, no_data = poll_to_end(runner, 0), poll_to_end(runner, 1)
    assert out_of_memory.state is RunState.OUT_OF_MEMORY
    assert "Tried to allocate 20.00 GiB" in str(out_of_memory.update.error)
    assert no_data.state is RunState.FAILED
    assert str(no_data.update.error).startswith(f"DataError: data.dir = '{tmp_path / 'nowhere'}'")


@pytest.mark.ray
def test_a_killed_worker_is_named_and_its_log_is_kept(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("killed")
    spec = make_spec(tmp_path, 0)
    ended = run_to_end(runner, spec, TWO)
    assert ended.state is RunState.FAILED
    assert str(ended.update.error).startswith("rank 1 (pid ")
    assert (spec.folder / "train.log").read_text().startswith("before the kill\n")
    wait_until(lambda: runner.free_slots(TWO) == 1)


@pytest.mark.ray
def test_a_dead_controller_leaves_no_placement_group(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("steps")
    runner.submit(make_spec(tmp_path, 0, steps=10_000), ONE)
    poll_until_running(runner, 0)
    (controller,) = live_actors("TrainController")
    os.kill(controller["Pid"], signal.SIGKILL)
    assert poll_to_end(runner, 0).state is RunState.FAILED
    wait_until(lambda: runner.free_slots(ONE) == 2)
    assert leftovers() == []


@pytest.mark.ray
def test_workers_that_find_no_room_fail_with_the_remedy(
    make_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    runner = make_runner("steps")
    other = placement_group([{"CPU": 2}])
    ray.get(other.ready())
    try:
        wait_until(lambda: runner.free_slots(ONE) == 0)
        ended = run_to_end(runner, make_spec(tmp_path, 0), ONE)
    finally:
        remove_placement_group(other)
    assert ended.state is RunState.FAILED
    assert str(ended.update.error).startswith("the workers did not start: 1 x {'CPU': 1.0}")
    assert "ray status" in str(ended.update.error)
    wait_until(lambda: runner.free_slots(ONE) == 2)


@pytest.mark.ray
def test_a_demand_that_never_fits_is_refused(make_runner: Any, tmp_path: Path) -> None:
    runner = make_runner("steps")
    assert runner.total_slots(Demand(workers=3)) == 0
    with pytest.raises(RunnerError, match=r"3 workers of \{'CPU': 1.0\}.*2 CPU, 0 GPU.*lower --wo"):
        runner.submit(make_spec(tmp_path, 0), Demand(workers=3))


@pytest.mark.parametrize(
    ("node", "demand", "fits"),
    [
        ({"CPU": 16.0, "GPU": 8.0}, Demand(8, 1.0, 1.0), 1),
        ({"CPU": 16.0, "GPU": 8.0}, Demand(2, 1.0, 1.0), 4),
        ({"CPU": 16.0, "GPU": 7.0}, Demand(8, 1.0, 1.0), 0),
        ({"CPU": 3.0, "GPU": 8.0}, Demand(2, 1.0, 1.0), 1),
        ({"CPU": 0.1 + 0.2}, Demand(3, 0.0, 0.1), 1),
        ({"CPU": 2.0}, Demand(2, 0.0, 0.5), 2),
        ({"CPU": 2.0}, Demand(1, 0.0, 0.0), 0),
        ({}, Demand(1, 0.0, 1.0), 0),
    ],
)
def test_gangs_per_node(node: dict[str, float], demand: Demand, fits: int) -> None:
    assert gangs_per_node(node, demand) == fits


DRIVER = """
import sys, time
from pathlib import Path
from service.runners.base import Demand, RunState
from service.runners.ray_runner import RayRunner
from tests.service_tests.runner_trials import make_spec, poll_until_running

runner = RayRunner(num_cpus=2, train="tests.service_tests.stand_in_train:steps")
runner.submit(make_spec(Path(sys.argv[1]), 0, steps=100_000), Demand(workers=2))
poll_until_running(runner, 0)
print("running", flush=True)
time.sleep(600)
"""


def processes_marked(mark: str) -> list[int]:
    pids = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CADDIE_TEST_MARK") == mark:
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_takes_its_embedded_ray_along(tmp_path: Path) -> None:
    environment = {**os.environ, "CADDIE_TEST_MARK": str(tmp_path)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    for attempt in ("first", "second"):  # the second starts on what the first left behind
        command = [sys.executable, "-c", DRIVER, str(tmp_path / attempt)]
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"running\n"
        assert len(processes_marked(str(tmp_path))) > 5
        driver.kill()
        driver.wait()
        wait_until(lambda: not processes_marked(str(tmp_path)))


@pytest.mark.ray
def test_an_address_where_nobody_listens_is_refused() -> None:
    code = "from service.runners.ray_cluster import connect; connect('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "RunnerError: nothing answers at the Ray address '127.0.0.1:1'" in last
    assert "ray start --head" in last
