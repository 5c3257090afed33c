"""Train functions for tests of faults on a cluster: what a trial does follows from its seed, and a
second attempt goes through.

Files in the folder $CADDIE_FAULTS say how far a trial is ("steps-3") and hold it there until
the test has done its worst ("go-3").
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.service_tests.stand_in_train import steps
from trainer.config import TrainConfig
from trainer.report import Reporter, TrainResult

FOLDER = "CADDIE_FAULTS"
CALM, RAISES, KILLED, FROZEN, HANGS, HOARDS, LOSES_NODE, LEAVES_CHILD, NO_DEVICE_MEMORY = range(9)
"""Kinds of trials: runtime.seed % 10."""
HOARD_BYTES = 64 * 2**30
"""More than any test machine lets one tensor have."""


def train(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """Fails in the first attempt as the seed says."""
    kind, first = config.runtime.seed % 10, _is_first(config.runtime.seed)
    if kind == NO_DEVICE_MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if kind == HOARDS:
        _hoard()
    if first:
        _fault(kind, config, reporter)
    return steps(config, reporter, out)


def _fault(kind: int, config: TrainConfig, reporter: Reporter) -> None:
    last = _rank() == _world() - 1
    reporter.emit("log", line="the first attempt")
    if kind == RAISES and last:
        raise ValueError("a defect of the node")
    if kind == KILLED and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == FROZEN and last:
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == HANGS:
        _one_step(reporter)
        time.sleep(600.0)
    if kind == LEAVES_CHILD:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ[FOLDER], "child").write_text(str(child.pid))
        raise ValueError("a child is left behind")
    if kind in (KILLED, FROZEN) and _world() > 1:
        dist.barrier()


def _hoard() -> None:
    """Ask for more memory than this process may have."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (HOARD_BYTES, resource.RLIM_INFINITY))
    torch.ones(HOARD_BYTES, dtype=torch.uint8)


def _one_step(reporter: Reporter) -> None:
    reporter.emit(
        "step",
        step=1,
        elapsed_s=0.05,
        progress=0.0,
        train_loss=1.0,
        step_ms=50.0,
        lr_mult=1.0,
        tokens_per_s=20.0,
    )


def _is_first(seed: int) -> bool:
    """Whether no attempt of this trial came so far; all ranks of a gang get the same answer."""
    mine = Path(os.environ[FOLDER], f"tried-{seed}-{_rank()}")
    first = not mine.exists()
    mine.touch()
    return first


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
