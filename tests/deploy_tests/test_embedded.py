"""The Ray that a sweep starts for itself: what it opens to the network."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy_tests.compose_stack import LOOPBACK, NOT_INHERITED

MARK = "CADDIE_TEST_EMBEDDED"
PROGRAM = f"""
import json, os
import ray
from service.runners.ray_cluster import connect
from tests.deploy_tests.compose_stack import what_runs

cluster = connect(num_cpus=1)
answer = ray.get(ray.remote(lambda: 41 + 1).remote())
running = what_runs({MARK!r}, os.environ[{MARK!r}])
cluster.disconnect()
addresses = [[command.split()[0], sorted(found)] for command, found in running if found]
print(json.dumps([answer, addresses]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_embedded_ray_listens_on_loopback_alone() -> None:
    kept = {k: v for k, v in os.environ.items() if not NOT_INHERITED.match(k)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**kept, MARK: secrets.token_hex(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer, listening = json.loads(done.stdout.splitlines()[-1])
    assert answer == 42
    assert any(program.endswith("gcs_server") for program, _ in listening)
    assert [each for each in listening if not set(each[1]) <= set(LOOPBACK)] == []
