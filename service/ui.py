"""`caddie ui`: the MLflow UI and optuna-dashboard, on loopback, for as long as the command runs.

Both are separate processes in process groups of their own; they are stopped, with everything they
started, on Ctrl-C, on SIGTERM, on a closed terminal, and when one of them dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from service.attachments import attachments_dir
from service.errors import RunnerError
from service.tracking.mlflow_mirror import VIEW, experiment_names
from service.tracking.outbox import STUDY_ID_FILE

HOST = "127.0.0.1"
MLFLOW_PORT = 5000
DASHBOARD_PORT = 8080
START_SECONDS = 90.0
"""A first start of MLflow migrates its database."""
STOP_SECONDS = 10.0


@dataclass
class Page:
    """A web page served by a process of ours."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_up(self) -> None:
        """Raises RunnerError with the end of the log when the process dies or stays silent."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if _answers(self.url):
                return
            time.sleep(0.2)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
        raise RunnerError(f"{self.name} did not start; the end of {self.log}:\n{tail}")


def free_port(wanted: int) -> int:
    """`wanted` if nobody has it, so that tunnels can be set up once; else any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RunnerError("no loopback port can be opened; see `caddie doctor`")


def mlflow_command(tracking_uri: str, artifact_root: str, port: int) -> list[str]:
    """A server for a local store. Only the loopback names may be in a request's Host and Origin:
    a page elsewhere must not reach the server through the browser."""
    names = (f"127.0.0.1:{port}", f"localhost:{port}")
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)),
        *("--backend-store-uri", tracking_uri, "--workers", "1"),
        *("--default-artifact-root", artifact_root),
        *("--allowed-hosts", ",".join(names)),
        *("--cors-allowed-origins", ",".join(f"http://{name}" for name in names)),
    ]


def dashboard_command(storage_url: str, port: int, attachments: Path) -> list[str]:
    """optuna-dashboard on a storage URL, with the files of trials."""
    attachments.mkdir(parents=True, exist_ok=True)
    code = "from optuna_dashboard._cli import main; main()"
    options = ("--host", HOST, "--port", str(port), "--server", "wsgiref")
    files = ("--artifact-dir", str(attachments))
    return [sys.executable, "-c", code, *options, *files, storage_url]


def serve(
    storage_url: str,
    tracking_uri: str,
    artifact_root: str,
    study: tuple[str, int] | None,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Start both pages, say their addresses, and wait until told to stop.

    Args:
        study: Name and Optuna's id of the study to link to; None = the list of studies.
        out: Folder of studies; logs go there, and trials' files come from there.
        say: Takes one line.

    Raises: RunnerError when a page does not start or dies.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_stop_signals())
        pages = []
        if tracking_uri.startswith(("http://", "https://")):
            say(f"MLflow:           {tracking_uri} (already running)")
        else:
            port = free_port(MLFLOW_PORT)
            command = mlflow_command(tracking_uri, artifact_root, port)
            pages.append(_start(stack, "MLflow", command, port, out / "ui-mlflow.log"))
        port = free_port(DASHBOARD_PORT)
        command = dashboard_command(storage_url, port, attachments_dir(out))
        pages.append(_start(stack, "optuna-dashboard", command, port, out / "ui-optuna.log"))
        for page in pages:
            page.wait_until_up()
            say(f"{page.name + ':':<17} {_deep_link(page, study, out)}")
        say("Ctrl-C stops both")
        _watch(pages)


class _Stop(BaseException):
    """A signal asked us to end."""


@contextmanager
def _stop_signals() -> Any:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: object) -> None:
        for other in numbers:  # once is enough: a second one must not cut off the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stop:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(stack: ExitStack, name: str, command: Sequence[str], port: int, log: Path) -> Page:
    output: IO[bytes] = stack.enter_context(log.open("wb"))
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    stack.callback(_stop_group, process)
    return Page(name, f"http://{HOST}:{port}", process, log)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: politely, then for good."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(0.05)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader: a zombie counts as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _watch(pages: list[Page]) -> None:
    while True:
        for page in pages:
            if page.process.poll() is not None:
                raise RunnerError(f"{page.name} ended by itself; see {page.log}")
        time.sleep(0.5)


def _deep_link(page: Page, study: tuple[str, int] | None, out: Path) -> str:
    """The page of the study where the address of one is known."""
    if study is None:
        return page.url
    name, number = study
    if page.name != "MLflow":
        return f"{page.url}/dashboard/studies/{number}"
    own_id = out / name / STUDY_ID_FILE
    for candidate in experiment_names(name, own_id.read_text()) if own_id.exists() else ():
        experiment = _experiment(page.url, candidate)
        if experiment is not None:
            return f"{page.url}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}"
    return page.url  # nothing mirrored yet


def _experiment(server: str, name: str) -> str | None:
    query = urllib.parse.urlencode({"experiment_name": name})
    url = f"{server}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return str(json.load(answer)["experiment"]["experiment_id"])
    except (OSError, KeyError, ValueError):
        return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
