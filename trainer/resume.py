"""The whole state of a running training as a file, so that a run whose worker was lost goes on.

A state is a tree of dicts, lists, numbers and tensors. Tensors lie in the container of
trainer/checkpoint.py as bytes, whatever their type, so that every bit comes back; the tree that
holds them is JSON. Nothing in the file is executed. Rank 0 writes and reads: Muon's sharded
momentum is gathered before, so a run may go on with other workers; random states are one for each
rank.

What the clock says is saved with the rest. Seconds trained after the last writing are lost with the
worker, and count for nobody's budget.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import checkpoint
from trainer.clock import BudgetClock
from trainer.errors import ArtifactError
from trainer.optim import Optimizer, WeightAverage
from trainer.workspace import Workspace

FILE = "state.bin"
"""In the folder of the run."""
Saved = Callable[[Path], None]
"""Told on every rank that rank 0 has a new state at this path, which exists there only."""
SHARE = 0.01
"""Of the time between two writings that one of them should take at most."""
_TREE = "tree"
_AGAIN = ("build", "prime")
"""Phases that a run which goes on has gone through once more by then."""


@dataclass
class StateFile:
    """Saves and restores one run on one rank; all methods are for all ranks together."""

    path: Path
    work: Workspace
    optimizer: Optimizer
    clock: BudgetClock
    average: WeightAverage | None
    saved: Saved | None = None
    saved_s: float = 0.0
    """Budget clock at the last writing."""
    is_told: bool = False
    """Whether the reader of the log knows that writing takes too long."""

    def is_due(self, elapsed_s: float) -> bool:
        """Whether it is time to save; the same on all ranks, given the common clock."""
        return elapsed_s - self.saved_s >= self.work.config.runtime.checkpoint_seconds

    def save(self, steps: dict[str, Any]) -> None:
        """Write the state and what the loop counts. The clock must be stopped."""
        started = time.perf_counter()
        clock = self.clock.state_dict()
        state = {
            "steps": steps,
            "clock": clock,
            "phases": dict(self.work.timer.seconds),
            "model": self.work.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "loader": self.work.loader.state_dict(),
            "random": self._random_states(),
        }
        self.work.group.on_main(lambda: self._write(state))
        self.saved_s = clock["spent"]
        if self.saved is not None:
            self.saved(self.path)
        self._weigh(time.perf_counter() - started)

    def _weigh(self, seconds: float) -> None:
        """Say it once when a writing takes more than SHARE of the time between two."""
        period = self.work.config.runtime.checkpoint_seconds
        if seconds <= SHARE * period or self.is_told:
            return
        self.is_told = True
        self.work.log(
            f"writing the state took {seconds:.2f} s, {seconds / period:.1%} of "
            f"runtime.checkpoint_seconds = {period:g}; raise it to {math.ceil(seconds / SHARE)} to "
            f"stay within {SHARE:.0%}"
        )

    def _write(self, state: dict[str, Any]) -> None:
        arrays: dict[str, np.ndarray] = {}
        tree = json.dumps(_taken_apart(state, arrays))
        arrays[_TREE] = np.frombuffer(tree.encode(), np.uint8)
        try:
            checkpoint.write(self.path, arrays, self.work.config)
        except OSError as error:  # the run itself is well
            self.work.log(f"{self.path}: the state was not saved ({error.strerror}); make room")

    def restore(self) -> dict[str, Any] | None:
        """Put everything back as it was; returns what the loop had counted. None when there is
        nothing to go on from.

        Raises: DataError when the data is not what the run began with.
        """
        group = self.work.group
        arrays = group.on_main(self._read) or {}
        text = bytes(arrays[_TREE]) if arrays else b""
        text = group.broadcast_bytes(text if group.is_main else None)
        if not text:
            return None
        state = self._put_together(json.loads(text), arrays)
        self.work.loader.load_state_dict(state["loader"])
        self.work.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.clock.load_state_dict(state["clock"])
        self.saved_s = state["clock"]["spent"]
        seconds = self.work.timer.seconds
        for name, spent in state["phases"].items():
            seconds[name] = seconds.get(name, 0.0) + spent
        self._set_random_states(state["random"])
        steps: dict[str, Any] = state["steps"]
        return steps

    def _read(self) -> dict[str, np.ndarray]:
        config = self.work.config
        if config.runtime.resume == "never" or not self.path.exists():
            return {}
        try:
            if checkpoint.read_config(self.path).digest() == config.digest():
                return checkpoint.read(self.path)
            self.work.log(f"{self.path}: of other settings; the run starts anew")
        except ArtifactError as error:
            self.work.log(f"{error}; the run starts anew")
        return {}

    def remove(self) -> None:
        """At the end of the run."""
        self.work.group.on_main(lambda: self.path.unlink(missing_ok=True))

    def _random_states(self) -> dict[str, Tensor]:
        """[ranks, bytes] of the generators, which dropout moves on each rank by itself."""
        gather, device = self.work.group.all_gather, self.work.group.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return {name: gather(own[None].to(device)).wait() for name, own in states.items()}

    def _set_random_states(self, states: dict[str, Tensor]) -> None:
        """Ranks that the run did not have before take those of the first ones."""
        rank = self.work.group.rank
        # A copy: a generator takes no view into a larger tensor.
        own = {name: rows[rank % len(rows)].clone().cpu() for name, rows in states.items()}
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and self.work.group.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.work.group.device)

    def _put_together(self, node: Any, arrays: dict[str, np.ndarray]) -> Any:
        """Inverse of _taken_apart; tensors come from rank 0 to every rank's device."""
        if not isinstance(node, list):
            return node
        kind, *rest = node
        if kind == "tensor":
            return self._broadcast(rest, arrays)
        values = [self._put_together(value, arrays) for value in rest]
        if kind == "dict":
            return dict(zip(values[::2], values[1::2], strict=True))
        return tuple(values) if kind == "tuple" else values

    def _broadcast(self, leaf: list[Any], arrays: dict[str, np.ndarray]) -> Tensor:
        name, dtype, shape, num_bytes = leaf
        group = self.work.group
        box = torch.empty(num_bytes, dtype=torch.uint8)
        if group.is_main:
            box.copy_(torch.from_numpy(arrays[name].copy()))
        box = group.broadcast_(box.to(group.device))
        return box.view(getattr(torch, dtype)).view(shape)


def _taken_apart(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The tree as JSON: every container a list that begins with its kind. Tensors go into `arrays`
    as bytes."""
    if isinstance(node, Tensor):
        name = f"t{len(arrays)}"
        flat = node.detach().cpu().contiguous().view(-1).view(torch.uint8)
        arrays[name] = flat.numpy()
        dtype = str(node.dtype).removeprefix("torch.")
        return ["tensor", name, dtype, list(node.shape), flat.numel()]
    if isinstance(node, dict):
        values = [value for pair in node.items() for value in pair]
        return ["dict", *(_taken_apart(value, arrays) for value in values)]
    if isinstance(node, list | tuple):
        kind = "tuple" if isinstance(node, tuple) else "list"
        return [kind, *(_taken_apart(value, arrays) for value in node)]
    return node
