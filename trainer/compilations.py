"""Counts what the compiler does, so that a run can say that it did nothing inside the clock."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_compilation(callback: Callable[[], None]) -> Iterator[None]:
    """Inside, `callback` is called at the start of every compilation: of a new graph, of a graph
    anew because a guard failed, and of a backward pass that was put off to its first use."""
    if "torch._dynamo" not in sys.modules:  # nothing here compiles; importing it takes seconds
        yield
        return
    handler = importlib.import_module("torch._dynamo.callback").callback_handler

    def started(*_: Any) -> None:
        callback()

    handler.register_start_callback(started)
    try:
        yield
    finally:
        handler.remove_start_callback(started)
