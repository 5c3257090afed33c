"""What every process of a trial on Ray runs: the train function, and how it makes itself known.

Separate from ray_trial because this code lands on GPU nodes: it imports neither Optuna nor MLflow.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import get_current_placement_group

from service.runners.gpu_watch import own_gpus, watch_gpus
from service.runners.processes import TRIAL, name_of
from service.runners.ray_mailbox import CONTROLLER, MailboxReporter, WorkerFailure, WorkerInfo
from trainer.compile_cache import use_compile_cache
from trainer.config import TrainConfig
from trainer.errors import DataError
from trainer.report import NullReporter, TrainResult

NO_HOST_MEMORY = "can't allocate memory"
"""How torch words, in a plain RuntimeError, that the host refuses memory to a tensor."""


class IntroduceController(ControllerCallback):
    """Makes the controller of a trial known to the driver, which sees to it that it goes."""

    def __init__(self, key: str, mailbox: Any) -> None:
        self._key = key
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        self._mailbox.register.remote(self._key, introduce(CONTROLLER))


def run_trial(job: dict[str, Any]) -> dict[str, Any]:
    """Train loop of a TorchTrainer: runs on every worker, in its process group.

    `job` has {"key", "mailbox", "config" (TrainConfig.to_dict), "train" (import path)}, and its
    "number" where the workers serve several (resident_worker). Returns
    {"result": TrainResult as JSON types, "artifact": bytes or None} on rank 0, {} elsewhere.
    """
    rank = ray.train.get_context().get_world_rank()
    key, mailbox = job["key"], job["mailbox"]
    os.environ[TRIAL] = key  # what this worker starts is found by it
    if not ray.get(mailbox.register.remote(key, introduce(rank, "number" in job))):
        raise RuntimeError("the trial was cancelled before it started")
    try:
        return _train(job, rank)
    except BaseException as error:
        ray.get(mailbox.fail.remote(key, describe_failure(rank, error)))
        raise


def _train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    config = TrainConfig.from_dict(job["config"])
    data_dir = config.data.dir
    if data_dir and not os.path.isdir(data_dir):
        raise DataError(
            f"data.dir = {data_dir!r} is not a folder on node {socket.gethostname()}; copy the "
            "data set to the same path on every node, or put it on a file system they share"
        )
    use_compile_cache(config.runtime.compile_cache)
    train = _load(job["train"])
    if config.runtime.checkpoint_seconds:
        train = partial(train, saved=partial(_hand_over, rank))
    if rank != 0:
        train(config, NullReporter(), None)
        return {}
    reporter = MailboxReporter(job["mailbox"], job["key"])
    try:
        # Train workers start in a folder of their own inside the session's.
        with tempfile.TemporaryDirectory(prefix="artifact-", dir=".") as out:
            _fetch_state(Path(out))
            with watch_gpus(own_gpus(), lambda numbers: reporter.emit("system", **numbers)):
                result = train(config, reporter, Path(out))
            artifact = Path(out, "artifact.bin")
            packed = artifact.read_bytes() if artifact.exists() else None
        return {"result": result.model_dump(mode="json"), "artifact": packed}
    finally:
        reporter.close()


def _hand_over(rank: int, state: Path) -> None:
    """Give the state that rank 0 has written to Ray Train, which keeps it in the trial's folder
    until an attempt on whatever node asks for it. Called on every rank."""
    folder = Checkpoint.from_directory(state.parent) if rank == 0 else None
    ray.train.report({}, checkpoint=folder)


def _fetch_state(out: Path) -> None:
    """Put the state that an earlier attempt handed over where the trainer looks for it."""
    earlier = ray.train.get_checkpoint()
    if earlier is not None:
        with earlier.as_directory() as folder:
            shutil.copytree(folder, out, dirs_exist_ok=True)


def _load(path: str) -> Callable[..., TrainResult]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def introduce(rank: int, stays: bool = False) -> WorkerInfo:
    """The process that calls this, an actor. `stays`: it has served other trials before."""
    log = os.readlink("/proc/self/fd/2")
    return WorkerInfo(
        rank=rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        node=ray.get_runtime_context().get_node_id(),
        actor=ray.get_runtime_context().current_actor,
        placement_group=get_current_placement_group(),
        log=log,
        log_from=os.path.getsize(log) if stays and os.path.isfile(log) else 0,
        process=name_of(os.getpid()) or "",
    )


def describe_failure(rank: int, error: BaseException) -> WorkerFailure:
    return WorkerFailure(
        rank=rank,
        time=time.time(),
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        out_of_memory=is_out_of_memory(error),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left for what was asked."""
    import torch  # here: the driver imports this module too, and starts faster without torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_HOST_MEMORY in str(error)
