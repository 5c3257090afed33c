"""deploy/slurm/ray.sbatch, run for real on one node; only Slurm's own two commands are fakes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.runners.processes import kill, marked
from tests.deploy_tests.compose_stack import LOOPBACK, NOT_INHERITED, free_port, what_runs
from tests.service_tests.runner_trials import wait_until

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "ray.sbatch"
MARK = "CADDIE_TEST_SLURM"


def allocation(folder: Path) -> dict[str, str]:
    """The environment of a batch script on a node of an allocation of one."""
    fakes = folder / "bin"
    fakes.mkdir()
    for name, text in {
        # srun [options] command...: runs it here
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "scontrol": "echo node1",
    }.items():
        (fakes / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fakes / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not NOT_INHERITED.match(k)}
    return {
        **kept,
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "CADDIE_ENV": str(Path(sys.executable).parents[1]),
        "SLURM_SUBMIT_DIR": str(folder),
        # Ports follow from it.
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "node1",
        MARK: str(folder),
    }


@pytest.mark.parametrize("script", ["slurm/ray.sbatch", "compose/make-secrets.sh"])
def test_scripts_are_sound(script: str) -> None:
    file = SCRIPT.parents[1] / script
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_command_is_needed(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPT], env=allocation(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 2 and "for example" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_one_node_runs_a_job_and_ends_on_term(tmp_path: Path) -> None:
    """The job's output comes through; on Slurm's warning everything goes, the token too."""
    code = (
        "import ray, time; ray.init(address='auto'); print('joined', flush=True); time.sleep(600)"
    )
    environment = allocation(tmp_path)
    log = tmp_path / "log"
    with log.open("wb") as output:
        script = subprocess.Popen(
            ["bash", SCRIPT, "python", "-c", code],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "joined\n" not in log.read_text(errors="replace"):
            assert script.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        running = what_runs(MARK, str(tmp_path))
        open_to = {address for _, addresses in running for address in addresses}
        assert open_to and open_to <= set(LOOPBACK)
        (token,) = tmp_path.glob(".caddie-ray-*/token")
        assert token.stat().st_mode & 0o777 == 0o600
        secret = token.read_text()
        assert len(secret) == 64
        assert not [command for command, _ in running if secret in command]
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 143
        assert not list(tmp_path.glob(".caddie-ray-*"))
        wait_until(lambda: what_runs(MARK, str(tmp_path)) == [])
    finally:
        script.kill()
        kill([p for p, env in marked(MARK) if env[MARK] == str(tmp_path)])
        shutil.rmtree(f"/tmp/ray-{environment['SLURM_JOB_ID']}", ignore_errors=True)
