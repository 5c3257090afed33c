"""`ray job submit` for real: a head node, a sweep as a job, `ray job stop`, and the study's rest.

The lines are those of the README. The cluster has ports, a token and a folder of its own, so that
it meets no other on this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.runners.processes import kill, marked
from tests.service_tests.runner_trials import wait_until
from trainer.data.demo_corpus import build_demo

ROOT = Path(__file__).resolve().parents[2]
MARK = "CADDIE_TEST_HEAD"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    build_demo(out)
    return out


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of a shell next to a running head node of two CPUs."""
    pytest.importorskip("aiohttp_cors", reason="ray job needs ray[default]")
    dashboard = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        MARK: secrets.token_hex(8),
    }
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    ports = ["--port", free_port(), "--dashboard-port", dashboard]
    ports += ["--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port()]
    loopback = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    start = ["ray", "start", "--head", "--block", *loopback, *map(str, ports)]
    start += ["--num-cpus", "2", "--object-store-memory", str(200 * 2**20), "--temp-dir", folder]
    without_address = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    head = subprocess.Popen(
        start, env=without_address, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: run(["ray", "job", "list"], environment, check=False).returncode == 0)
        yield environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        kill([process for process, env in marked(MARK) if env[MARK] == environment[MARK]])
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clean checkout holds of the code; a used one may hold more than a job can carry."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("trainer", "search_spaces", "service"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def run(
    command: list[str], environment: dict[str, str], cwd: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def status(out: Path, environment: dict[str, str]) -> dict[str, object]:
    command = ["caddie", "sweep", "status", "smoke", "--out", str(out), "--json"]
    return dict(json.loads(run(command, environment).stdout))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_job_leaves_a_study_that_the_next_job_finishes(
    environment: dict[str, str], checkout: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    submit = ["ray", "job", "submit", "--working-dir", "."]
    sweep = ["caddie", "sweep", "run", "smoke", "--trials", "3"]
    sweep += ["--out", str(out), "--data", str(data)]

    run([*submit, "--no-wait", "--submission-id", "first", "--", *sweep], environment, checkout)
    wait_until(lambda: any(out.glob("smoke/trial-*/metrics.jsonl")))
    run(["ray", "job", "stop", "first"], environment)
    assert "was stopped" in run(["ray", "job", "status", "first"], environment).stdout
    states = status(out, environment)["states"]
    assert isinstance(states, dict)
    assert states["COMPLETE"] + states["PRUNED"] < 3
    wait_until(lambda: not workers_of(environment))

    streamed = run([*submit, "--", *sweep], environment, checkout)
    assert "Leaderboard of smoke" in streamed.stdout + streamed.stderr
    ended = status(out, environment)["states"]
    assert isinstance(ended, dict)
    assert ended["COMPLETE"] + ended["PRUNED"] == 3
    assert ended["RUNNING"] == 0
    assert [path.name for path in out.glob("smoke/*/result.json")]


def workers_of(environment: dict[str, str]) -> list[psutil.Process]:
    """Train workers that still live in our cluster."""
    return [
        process
        for process, env in marked(MARK)
        if env[MARK] == environment[MARK] and "RayTrainWorker" in " ".join(process.cmdline())
    ]
