"""`caddie ui` as a process: both pages answer, and nothing is left when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import optuna
import psutil
import pytest

from service.ui import free_port

ROOT = Path(__file__).parents[2]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "service.cli", "ui", *arguments, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
    )


def addresses(process: subprocess.Popen[str]) -> dict[str, str]:
    """The lines up to "Ctrl-C", as {name: url}."""
    assert process.stdout is not None
    found = {}
    for line in process.stdout:
        if match := re.match(r"(\S+): +(http\S+)", line):
            found[match[1]] = match[2]
        if "Ctrl-C" in line:
            return found
    raise AssertionError("caddie ui ended early")


def get(url: str, host: str | None = None) -> bytes:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def test_a_port_in_use_is_not_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert free_port(taken) != taken


@pytest.mark.slow
def test_both_pages_serve_the_study_and_leave_nothing_behind(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/caddie.db", study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    process = start(tmp_path, "s")
    try:
        pages = addresses(process)
        dashboard = pages["optuna-dashboard"]
        assert dashboard.endswith(f"/dashboard/studies/{study._study_id}")
        base = dashboard.split("/dashboard")[0]
        names = [
            row["study_name"] for row in json.loads(get(base + "/api/studies"))["study_summaries"]
        ]
        assert names == ["s"]
        mlflow = pages["MLflow"].split("/#")[0]
        assert b"<html" in get(mlflow + "/").lower()
        with pytest.raises(urllib.error.HTTPError) as refused:  # a name that points here by DNS
            get(mlflow + "/api/2.0/mlflow/experiments/get?experiment_id=0", host="evil.example")
        assert refused.value.code == 403
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 0
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in children if child.is_running()] == []


def test_an_unknown_study_is_refused(tmp_path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{tmp_path}/caddie.db", study_name="depth")
    process = start(tmp_path, "dept")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "did you mean depth?" in errors
