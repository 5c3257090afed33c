"""The driver, or the head it stands on, dies of `kill -9`; then the same study again. See
docs/faults.md; `make test-faults`."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from service.runners.processes import kill, marked
from tests.service_tests.cluster_faults import FOLDER
from tests.service_tests.ray_driver import PHASES
from tests.service_tests.runner_trials import wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MARK = "CADDIE_TEST_MARK"
pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of drivers and clusters of this test, which all end with it."""
    mark = secrets.token_hex(8)
    names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {**names, MARK: mark, FOLDER: str(tmp_path), "PYTHONPATH": str(ROOT)}
    kill([process for process, found in marked(MARK) if found[MARK] == mark])


def start(
    folder: Path, environment: dict[str, str], trials: int, *phase: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.service_tests.ray_driver", str(folder), str(trials)]
    return subprocess.Popen(
        [*command, *phase],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(environment: dict[str, str]) -> list[str]:
    return [
        " ".join(process.cmdline())
        for process, found in marked(MARK)
        if found[MARK] == environment[MARK]
    ]


def assert_whole(folder: Path, trials: int) -> None:
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'caddie.db'}")
    found = study.get_trials()
    assert [trial.number for trial in found] == list(range(trials))
    assert [trial.params["runtime.seed"] for trial in found] == [
        10 * (n + 1) for n in range(trials)
    ]
    assert [(trial.state.name, trial.value) for trial in found] == [("COMPLETE", 1.5)] * trials
    ends = (folder / "s" / "ends.log").read_text().split()
    assert Counter(ends) == Counter(map(str, range(trials))), "none is told twice"
    assert all("attempt" not in trial.user_attrs for trial in found), "a driver's end is no failure"


def test_a_driver_killed_in_each_phase_and_started_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    for phase in PHASES:
        driver = start(tmp_path, environment, 1, phase)
        _, said = driver.communicate(timeout=200)
        assert driver.returncode == -signal.SIGKILL, said
        wait_until(lambda: alive(environment) == [])
    last = start(tmp_path, environment, 1)
    _, said = last.communicate(timeout=200)
    assert last.returncode == 0, said
    assert_whole(tmp_path, 1)
    wait_until(lambda: alive(environment) == [])


def test_a_restarted_head_ends_the_driver_and_the_next_one_goes_on(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        port, dashboard = free_port(), free_port()
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "1"]
        command += ["--port", str(port), "--dashboard-port", str(dashboard)]
        command += ["--include-dashboard", "false", "--ray-client-server-port", str(free_port())]
        command += ["--object-store-memory", str(100 * 2**20), "--temp-dir", folder]
        environment |= {"RAY_AUTH_MODE": "disabled"}
        joined = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}

        def start_head() -> subprocess.Popen[bytes]:
            quiet = subprocess.DEVNULL
            head = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
            wait_until(lambda: answers(port))
            return head

        head = start_head()
        first = start(tmp_path, joined, 2)
        wait_until(lambda: (tmp_path / "s" / "running").exists())
        mine = [p for p, found in marked(MARK) if found[MARK] == environment[MARK]]
        kill([p for p in mine if p.pid != first.pid])  # the head and all it has started, at once
        head.wait()
        died = time.monotonic()
        _, said = first.communicate(timeout=200)
        print(f"the driver ended {time.monotonic() - died:.0f} s later, code {first.returncode}")
        assert first.returncode != 0
        wait_until(lambda: alive(environment) == [])
        head = start_head()
        again = start(tmp_path, joined, 2)
        _, said = again.communicate(timeout=200)
        assert again.returncode == 0, said
        assert_whole(tmp_path, 2)
        kill([process for process, found in marked(MARK) if found[MARK] == environment[MARK]])
        head.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True
