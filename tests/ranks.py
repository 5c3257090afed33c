"""Runs a function on several real gloo ranks on this machine, for tests of collectives."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from trainer.distributed import Group, join_group


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call function(group, *args) on `size` ranks; returns their results, rank 0 first.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(queue, function, rank, size, port, args))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, value, failure = queue.get(timeout=120)
            assert failure is None, f"rank {rank} failed:\n{failure}"
            answers[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(size)]


def _rank(
    queue: Any, function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with join_group("cpu") as group:
            assert isinstance(group, Group)
            queue.put((rank, function(group, *args), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
