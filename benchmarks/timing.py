"""Times calls on this machine: medians, by CUDA events where there is a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of a call after a few unmeasured ones: by events on cuda, by the clock elsewhere."""
    for _ in range(max(2, repeats // 5)):
        call()
    seconds = _seconds_by_events if device.type == "cuda" else _seconds_by_clock
    return statistics.median(seconds(call) for _ in range(repeats))


def _seconds_by_events(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _seconds_by_clock(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
