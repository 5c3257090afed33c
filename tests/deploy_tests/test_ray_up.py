"""deploy/ray/cluster.yaml, by Ray's own judgement."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "ray" / "cluster.yaml"


def test_ray_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_the_token_travels_as_a_file_and_the_job_server_stays_at_home() -> None:
    config = yaml.safe_load(FILE.read_text())
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    (worker,) = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert all("RAY_AUTH_MODE=token" in line for line in (head, worker))


def test_files_that_it_names_are_here() -> None:
    named = re.findall(r"~/caddie/([\w./-]+)", FILE.read_text())
    assert {"constraints.txt", "deploy/docker/gpu.txt"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
