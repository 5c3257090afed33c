"""What a trial's own GPUs do while it runs: load, memory, power, temperature, as `system` records.

Read from NVIDIA's library beside the training, a sample every SAMPLE_S, on the host of the GPUs. A
machine without that library or without GPUs is watched by nobody, and says nothing of it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SAMPLE_S = 10.0


@contextmanager
def watch_gpus(
    gpus: Sequence[str], say: Callable[[dict[str, Any]], None], period_s: float = SAMPLE_S
) -> Iterator[None]:
    """Sample while the block runs, from a thread of its own.

    Args:
        gpus: As CUDA_VISIBLE_DEVICES names them: numbers or identifiers.
        say: Takes {"sample": n, "gpu_0_utilization_percentage": ...}; GPUs count from 0 within the
            trial. Called on the thread.
        period_s: Seconds between samples.
    """
    library = _library() if gpus else None
    if library is None:
        yield
        return
    ended = threading.Event()
    arguments = (library, gpus, say, period_s, ended)
    thread = threading.Thread(target=_sample, args=arguments, name="gpu-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(period_s)


def own_gpus() -> list[str]:
    """GPUs that this process was given; none unless it was given some by name."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]


def append_to(metrics: Path) -> Callable[[dict[str, Any]], None]:
    """For `say`, where the trainer itself writes metrics.jsonl: whole lines beside its own."""

    def say(numbers: dict[str, Any]) -> None:
        line = json.dumps({"kind": "system", "time": time.time(), **numbers}) + "\n"
        with metrics.open("a") as file:  # one write at the end of the file
            file.write(line)

    return say


def read_gpu(library: Any, gpu: str) -> dict[str, float]:
    """One GPU's numbers, by the names that MLflow gives them."""
    by_number = library.nvmlDeviceGetHandleByIndex, int
    find, name = by_number if gpu.isdecimal() else (library.nvmlDeviceGetHandleByUUID, str)
    handle = find(name(gpu))
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    return {
        "utilization_percentage": float(library.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": 100 * memory.used / memory.total,
        "power_usage_watts": library.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_celsius": float(library.nvmlDeviceGetTemperature(handle, 0)),
    }


def _sample(
    library: Any,
    gpus: Sequence[str],
    say: Callable[[dict[str, Any]], None],
    period_s: float,
    ended: threading.Event,
) -> None:
    sample = 0
    while not ended.wait(period_s):
        numbers: dict[str, float] = {}
        for place, gpu in enumerate(gpus):
            with suppress(library.NVMLError):  # a card that says nothing of its power, or is lost
                read = read_gpu(library, gpu)
                numbers |= {f"gpu_{place}_{name}": value for name, value in read.items()}
        if numbers:
            sample += 1
            with suppress(OSError):  # a full disk is the trial's affair
                say({"sample": sample, **numbers})


def _library() -> Any:
    """pynvml, started; None where there is no such library or no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
