"""Train functions with the signature of trainer.loop.train that do one thing each, in real worker
processes: to see what a runner makes of it without waiting for a model to train."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.report import Reporter, TrainResult

ARTIFACT = bytes(range(256)) * 4096
"""One MiB that is not text."""


def steps(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """budget.max_steps steps of 0.05 s; train_loss is the sum of all ranks + 1 over all steps, so
    that a missing rank shows. Stops with rank 0."""
    reporter.emit("start", num_params=7, world_size=_world(), device="cpu", total_tokens_per_step=1)
    total, reason, done = 0.0, None, 0
    for done in range(1, (config.budget.max_steps or 0) + 1):
        time.sleep(0.05)
        flags = torch.tensor([_rank() + 1.0, float(reporter.stop_requested() is not None)])
        if _world() > 1:
            dist.all_reduce(flags)
        total += flags[0].item()
        reporter.emit(
            "step",
            step=done,
            elapsed_s=0.05 * done,
            progress=0.0,
            train_loss=total,
            step_ms=50.0,
            lr_mult=1.0,
            tokens_per_s=20.0,
        )
        if flags[1].item() > 0:
            reason = reporter.stop_requested() or "stopped with rank 0"
            break
    reporter.emit("log", line="the last line")
    if out is not None and reason is None:
        (out / "artifact.bin").write_bytes(ARTIFACT)
    return TrainResult(
        status="finished" if reason is None else "stopped",
        stop_reason=reason,
        steps=done,
        tokens=done,
        num_params=7,
        world_size=_world(),
        device="cpu",
        phases={"train": 0.05 * done},
        train_loss=total,
        val_bpb=1.5 if reason is None else None,
    )


def bad_setting(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """Rank 1 refuses; rank 0 waits for it in a collective."""
    reporter.emit("log", line="before the error")
    if _rank() == 1:
        raise ConfigError("model.num_layers = 0: give at least one")
    dist.barrier()
    raise AssertionError("unreachable")


def no_device_memory(
    config: TrainConfig, reporter: Reporter, out: Path | None = None
) -> TrainResult:
    """What CUDA raises when the model does not fit."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def killed(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """The kernel takes rank 1 away in the middle."""
    reporter.emit("log", line="before the kill")
    time.sleep(1.0)
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120.0)
    raise AssertionError("unreachable")


def hangs_once(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """The last rank hangs in its third step, the others in their next collective; an attempt that
    finds the file of an earlier one goes through. The file is $HUNG_ONCE."""
    marker = Path(os.environ["HUNG_ONCE"])
    if marker.exists():
        return steps(config, reporter, out)
    if _world() > 1:
        dist.barrier()
    marker.touch()
    for done in range(1, 100):
        if done == 3 and _rank() == _world() - 1:
            time.sleep(600.0)
        if _world() > 1:
            dist.barrier()
        reporter.emit(
            "step",
            step=done,
            elapsed_s=0.05 * done,
            progress=0.0,
            train_loss=1.0,
            step_ms=50.0,
            lr_mult=1.0,
            tokens_per_s=20.0,
        )
    raise AssertionError("unreachable")


def crowded_host(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """Takes 2 GiB of memory and waits for Ray's memory monitor."""
    reporter.emit("log", line="taking memory")
    hoard = [torch.ones(2**26) for _ in range(8)]
    time.sleep(120.0)
    del hoard
    raise AssertionError("unreachable")


HELD: list[torch.Tensor] = []
POISON, HOARD, KILLED, ENDLESS = 901, 902, 903, 904
"""Seeds at which `train_or_harm` does something else than train."""


def train_or_harm(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """The real train function, but for some seeds: for what trials of one process do to another."""
    seed = config.runtime.seed
    if seed == KILLED:
        return killed(config, reporter, out)
    if seed == ENDLESS:
        return steps(config, reporter, out)
    if seed == HOARD:
        HELD.append(torch.ones(2**20))
    from trainer.loop import train

    result = train(config.with_overrides({"runtime.seed": 5}), reporter, out)
    if seed == POISON:
        poison()
    return result


def poison() -> None:
    """Change all global state that comes to mind; leave nothing that cannot be put back."""
    import gc
    import random
    import sys
    import warnings

    import numpy as np

    import trainer.schedule
    import trainer.workspace
    from trainer.compress import CODECS
    from trainer.model.gpt import GPT

    random.seed(_rank())
    np.random.seed(_rank())
    torch.manual_seed(_rank())
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.backends.mkldnn.fp32_precision = "bf16"  # type: ignore[attr-defined]
    torch.autograd.set_detect_anomaly(True)
    torch.autograd.graph.disable_saved_tensors_hooks("poisoned").__enter__()
    os.environ["CADDIE_POISON"] = "left behind"
    os.environ["LOCAL_RANK"] = "5"
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.path.insert(0, "/nowhere")
    sys.setrecursionlimit(5000)
    gc.disable()
    warnings.simplefilter("error")
    GPT.poisoned = True  # type: ignore[attr-defined]
    CODECS.clear()
    trainer.workspace.count = lambda model: -1
    trainer.schedule.lr_multiplier = lambda *_: 0.0
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
