"""Finding or starting the Ray cluster of a sweep, and counting the gangs that fit on its nodes.

Separate from ray_runner because none of it knows what a trial is. Everything here runs in the
driver process.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.ray_logging import stdout_deduplicator

from service.errors import RunnerError
from service.runners.base import Demand
from service.runners.processes import kill, marked, name_of

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of an embedded Ray. Only packed artifacts pass through it, 16 MB each at most."""
CONNECT_TIMEOUT_S = 3.0
"""How long the head node may take to accept a connection."""

DRIVER = "CADDIE_RAY_DRIVER"
"""Environment variable of all processes of an embedded Ray: the driver that started it."""

SETTINGS = {
    # How soon after its end a trial is noticed at the latest (default 2).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker that does not answer for this long is lost (default 600: a whole trial).
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    # Nobody reads Train's Prometheus gauges; they cost the controller time.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # The controller waits for its workers on purpose.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # How long survivors may take to leave the process group when a rank is gone (default 30).
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # A trial without GPUs sees none, and picks the CPU as its process group does.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
EMBEDDED_SETTINGS = {
    # One controller with a few workers may poll more often than a head node with hundreds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Training is what the machine is for: Ray would give it the lowest priority (15), and whatever
    # else runs would then show in its step times.
    "RAY_worker_niceness": "0",
    # Nobody reclaims a laptop; saves one process per trial.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray."""

    address: str
    started_here: bool
    """This process started it, and it ends with this process."""
    connected_here: bool
    """This process was not connected before."""

    def disconnect(self) -> None:
        """Leave; an embedded Ray stops all its processes."""
        if self.connected_here and ray.is_initialized():
            ray.shutdown()
        if self.started_here:
            end_leftovers()


def connect(
    address: str | None = None, num_cpus: int | None = None, num_gpus: int | None = None
) -> Cluster:
    """Join the cluster at `address` (default: RAY_ADDRESS), or start one in this process.

    num_cpus and num_gpus limit a started one (default: what this process may use). Call it from the
    main thread: an embedded Ray dies with the thread that started it. Raises RunnerError.
    """
    if ray.is_initialized():
        return Cluster(ray.get_runtime_context().gcs_address, False, False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    _keep_standard_output_clean()
    settings = SETTINGS if address else SETTINGS | EMBEDDED_SETTINGS
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # Also as the environment of the whole job: equal to what Train asks for its own processes, so
    # that Ray can hand out processes that it has started in advance.
    environment = {name: os.environ[name] for name in settings}
    with _signal_handlers_kept():
        if address:
            _join(address, environment)
            return Cluster(address, started_here=False, connected_here=True)
        _start(num_cpus, num_gpus, environment)
        return Cluster(ray.get_runtime_context().gcs_address, True, True)


def _start(num_cpus: int | None, num_gpus: int | None, environment: dict[str, str]) -> None:
    end_leftovers()
    _provide_token()
    _stay_on_loopback()
    os.environ[DRIVER] = str(name_of(os.getpid()))
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus or len(os.sched_getaffinity(0)),
            num_gpus=num_gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": environment},
            **_QUIET,
        )
    except Exception as error:
        raise RunnerError(
            f"Ray cannot start on this machine: {error}; run `caddie doctor`, or use the local "
            "runner"
        ) from error


def _join(address: str, environment: dict[str, str]) -> None:
    if "://" in address:
        raise RunnerError(
            f"Ray address {address!r} is of a kind that cannot run sweeps; give HOST:PORT of the "
            "head node when on a node of the cluster, and use `ray job submit` from elsewhere"
        )
    if address != "auto":
        _check_answers(address)
    # `ray start` asks for tokens as soon as this user has one; so do we then.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        # Outside `ray job submit`, which brings the code along.
        runtime_env |= _packages()
    try:
        ray.init(address=address, runtime_env=runtime_env, **_QUIET)
    except Exception as error:
        raise RunnerError(
            f"cannot join the Ray cluster at {address!r}: {error}; run on a node of the cluster, "
            "or use `ray job submit`; a cluster that asks for tokens needs RAY_AUTH_MODE=token and "
            "the same token here"
        ) from error


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RunnerError(
            f"nothing answers at the Ray address {address!r} ({error}); start a head node with "
            "`ray start --head`, correct the address, or leave it out to run on this machine alone"
        ) from error


def _packages() -> dict[str, Any]:
    """The code to bring along: our three packages, wherever this process has them from."""
    import search_spaces
    import service
    import trainer

    folders = [str(Path(package.__path__[0])) for package in (trainer, search_spaces, service)]
    return {"py_modules": folders, "excludes": ["**/__pycache__"]}


def end_leftovers() -> None:
    """Kill workers of embedded Rays whose raylet is gone. Workers leave by themselves then, but
    some hang in their exit (seen once in fifty, in a static destructor of Ray) and keep their
    memory."""
    kill(
        [
            process
            for process, environment in marked(DRIVER)
            if (raylet := environment.get("RAY_RAYLET_PID", "")).isdigit()
            and name_of(int(raylet)) is None
        ]
    )


def _keep_standard_output_clean() -> None:
    """Ray prints news of dead workers on standard output, whatever it was told about logging; the
    runner says it better, and standard output may have to be JSON. The environment variable for
    this, RAY_DEDUP_LOGS_SKIP_REGEX, is read when Ray is imported: too early for us."""
    stdout_deduplicator.skip_re = re.compile("")


def _provide_token() -> None:
    """Give an embedded Ray a token of its own where none is set up, instead of letting it write one
    into the home folder, which may be read-only."""
    if os.environ.get("RAY_AUTH_MODE") or (Path.home() / ".ray" / "auth_token").exists():
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _stay_on_loopback() -> None:
    """Ray takes 127.0.0.1 for "find this machine's address" and then listens on every interface,
    unless it is told that clusters are not wanted: by this variable, which its processes read at
    their start, and by the constant that this process made of it when it imported Ray."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """ray.init replaces the handler of SIGTERM by one that exits at once; the sweep has its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread: nothing was replaced
            signal.signal(signal.SIGTERM, before)


def gang_resources(demand: Demand) -> dict[str, float]:
    """Resources of one worker as Ray names them."""
    resources = {"CPU": demand.cpus_per_worker, "GPU": demand.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount > 0}


def gangs_per_node(node: Mapping[str, float], demand: Demand) -> int:
    """How many trials fit on one node: all workers of a trial run on the same node."""
    needs = {name: amount * demand.workers for name, amount in gang_resources(demand).items()}
    if not needs:
        return 0
    # Ray counts in ten-thousandths; the margin forgives float rounding, not a missing CPU.
    return min(int(node.get(name, 0.0) / need + 1e-4) for name, need in needs.items())


def nodes_total() -> dict[str, dict[str, float]]:
    """Resources of every living node, by node id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def nodes_available() -> dict[str, dict[str, float]]:
    """Free resources of every living node, by node id; up to a second old."""
    return ray._private.state.available_resources_per_node()
