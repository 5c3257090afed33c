"""Faults of workers and nodes on a real cluster: a head and nodes of one processor each, several
raylets on this machine. `make test-faults`; docs/faults.md has the whole table.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from service.ledger import WORDS
from service.policies import Policy
from service.runners import gang_pool
from service.runners.base import Demand, RunState
from service.runners.processes import TRIAL, marked
from service.runners.ray_cluster import SETTINGS, nodes_total
from service.runners.ray_runner import RayRunner
from tests.service_tests import cluster_faults as kinds
from tests.service_tests.ray_sweeps import TRAIN, RaySweep, leftovers
from tests.service_tests.runner_trials import make_spec, poll_to_end, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that trains nothing and one node; tests add and remove others."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        own = {**SETTINGS, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "5"}
        own |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
        own |= {"PYTHONPATH": str(ROOT), kinds.FOLDER: folder}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        cluster = Cluster(
            initialize_head=True, head_node_args={**NODE, "num_cpus": 0}, shutdown_at_exit=True
        )
        cluster.add_node(**NODE)
        ray.init(
            address=cluster.address,
            runtime_env={"env_vars": own},
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def two_nodes(cluster: Cluster) -> Iterator[Cluster]:
    node = cluster.add_node(**NODE)
    yield cluster
    if node in cluster.worker_nodes:
        cluster.remove_node(node, allow_graceful=False)


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 40
    while (left := leftovers() + [p.pid for p, _ in marked(TRIAL)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


FIRST = {
    kinds.RAISES: "ValueError: a defect of the node",
    kinds.KILLED: "rank 0 (pid ",
    kinds.FROZEN: "rank 0 (pid ",
    kinds.HANGS: "hung: no step was reported for",
}
"""Kind of a trial -> how the error of its first attempt begins."""


def test_whatever_a_worker_does_its_trial_goes_through_in_the_end(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    seeds = [*FIRST, kinds.CALM, kinds.HOARDS, kinds.NO_DEVICE_MEMORY]
    sweep = RaySweep(tmp_path, seeds, silence_s=4.0, quarantine_failures=0)
    wall = sweep.run(timeout_s=500)
    trials = sweep.trials()
    assert [trial.params["runtime.seed"] for trial in trials] == seeds
    for trial, kind in zip(trials, seeds, strict=True):
        if kind in FIRST:
            assert trial.user_attrs["attempt"] == 2, kind
            assert trial.user_attrs["error.attempt-1"].startswith(FIRST[kind])
        if kind in (*FIRST, kinds.CALM):
            assert (trial.state.name, trial.value) == ("COMPLETE", 1.5)
            continue
        assert trial.state.name == "PRUNED"
        assert trial.constraints["memory"] > 0
        assert "attempt" not in trial.user_attrs, "it would run out of memory again"
    hoard, device = (trial.user_attrs["reason"] for trial in trials[-2:])
    assert "does not fit the host's memory" in hoard and "fewer trials at once" in hoard
    assert "does not fit the device's memory: OutOfMemoryError: CUDA out of memory" in device
    assert "lower data.micro_batch_tokens" in device
    assert sorted(n for n, _ in sweep.recorder.ended) == list(range(len(seeds)))
    found = sweep.scheduler.status().gpu_seconds
    assert found.total == pytest.approx(2 * wall, rel=0.01)
    assert sum(getattr(found, word) for word in WORDS) == pytest.approx(2 * wall, rel=0.01)
    assert found.wasted > 4.0
    assert_nothing_left()


def test_a_node_that_fails_is_left_alone_and_cleaned_before_it_is_used_again(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    sweep = RaySweep(tmp_path, [10 + kinds.LEAVES_CHILD], quarantine_failures=1)
    places: dict[int, str] = {}
    unclean: set[str] = set()

    def look() -> None:
        for trial in sweep.runner._trials.values():
            if trial.node is not None:
                places[trial.spec.attempt] = trial.node
        unclean.update(sweep.runner._quarantine.unclean_nodes())

    _run_without_closing(sweep, look)
    child = int(Path(os.environ[kinds.FOLDER], "child").read_text())
    assert places[1] != places[2], "the second attempt goes elsewhere"
    assert unclean == {places[1]}
    wait_until(lambda: not psutil.pid_exists(child))
    wait_until(lambda: sweep.runner._quarantine.unclean_nodes() == frozenset())
    assert sweep.runner._pool.closed(sweep.scheduler._demand) == {places[1]}, "still in quarantine"
    assert sweep.runner.free_slots(sweep.scheduler._demand) <= 1
    sweep.scheduler.close()
    assert sweep.states() == ["COMPLETE"]
    assert_nothing_left()


def test_gangs_that_stay_leave_a_node_that_is_closed(
    two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_pool, "IDLE_S", 600.0)
    limits = Policy(quarantine_failures=1)
    runner = RayRunner(train=TRAIN, isolation="resident", policy=limits)
    try:
        places = []
        for number in range(4):
            if number == 2:
                runner._quarantine.failed(str(places[0]))
                wait_until(lambda: runner._pool.is_empty)
            open_nodes = 2 if number < 2 else 1  # all of them idle, as is the gang that stays
            wait_until(lambda n=open_nodes: runner.free_slots(Demand()) == n)  # type: ignore[misc]
            spec = make_spec(tmp_path, number, 4, runtime__seed=10 * number)
            runner.submit(spec, Demand())
            wait_until(lambda n=number: runner._trials[n].node)  # type: ignore[misc]
            places.append(runner._trials[number].node)
            assert poll_to_end(runner, number).state is RunState.FINISHED
        assert places[0] == places[1] != places[2] == places[3]
    finally:
        runner.close()
    assert_nothing_left()


def _run_without_closing(sweep: RaySweep, look: Any) -> None:
    deadline = time.monotonic() + 200
    while sweep.scheduler.step():
        assert time.monotonic() < deadline
        look()
        time.sleep(0.05)


def test_a_node_that_goes_away_in_each_phase(cluster: Cluster, tmp_path: Path) -> None:
    """Five trials in turn on the one node there is; each loses it in another phase, and a new one
    joins."""
    sweep = RaySweep(tmp_path, [100, 110, 120, 130, 140], steps=30, quarantine_failures=1)
    lost: list[int] = []

    def replace_node() -> None:
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**NODE)

    def is_due(number: int) -> bool:
        trial = sweep.runner._trials[number]
        files = trial.folder
        return {
            0: lambda: True,  # before the gang
            1: lambda: bool(trial.workers) and trial.state is RunState.STARTING,
            2: lambda: trial.state is RunState.RUNNING,
            3: lambda: files.log.exists() and "the last line" in files.log.read_text(),
            4: lambda: trial.settled,  # the result is here and not told
        }[number]()

    def strike() -> None:
        for number in list(sweep.runner._trials):
            if number == 4:
                wait_until(lambda: sweep.runner._trials[4].settled)
            if number not in lost and is_due(number):
                lost.append(number)
                replace_node()

    sweep.run(strike, timeout_s=500)
    assert lost == [0, 1, 2, 3, 4]
    trials = sweep.trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert [trial.value for trial in trials] == [1.5] * 5
    attempts = [trial.user_attrs.get("attempt", 1) for trial in trials]
    assert attempts[1:3] == [2, 2]
    assert attempts[0] <= 2 and attempts[3] <= 2
    assert attempts[4] == 1, "what had arrived is not trained again"
    assert sorted(n for n, _ in sweep.recorder.ended) == list(range(5))
    assert len(nodes_total()) == 2
    assert_nothing_left()
