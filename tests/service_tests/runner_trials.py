"""Submitting small trials and waiting for their end, for the tests of the runners."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.runners.base import Demand, Runner, RunState, Update
from service.trial import TrialSpec
from trainer.recipes.tiny import tiny

TIMEOUT_S = 120.0


@dataclass
class Ended:
    """What the polls of a trial added up to."""

    state: RunState
    update: Update
    events: list[dict[str, Any]] = field(default_factory=list)
    states: list[RunState] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def make_spec(folder: Path, number: int, steps: int = 10, **overrides: Any) -> TrialSpec:
    """A trial of the recipe tiny in folder/NUMBER. Overrides use "__" for the dots."""
    changes = {path.replace("__", "."): value for path, value in overrides.items()}
    config = tiny().with_overrides({"budget.max_steps": steps, **changes})
    (folder / str(number)).mkdir(parents=True, exist_ok=True)
    return TrialSpec("study", number, "tiny", changes, config, folder / str(number))


def run_to_end(
    runner: Runner,
    spec: TrialSpec,
    demand: Demand,
    on_update: Callable[[Update], None] = lambda update: None,
) -> Ended:
    """Submit and poll until the final state."""
    runner.submit(spec, demand)
    return poll_to_end(runner, spec.number, on_update)


def poll_to_end(
    runner: Runner, number: int, on_update: Callable[[Update], None] = lambda update: None
) -> Ended:
    ended = Ended(RunState.STARTING, Update(RunState.STARTING))
    deadline = time.monotonic() + TIMEOUT_S
    while ended.state in (RunState.STARTING, RunState.RUNNING):
        assert time.monotonic() < deadline, f"trial {number} is still {ended.state}"
        update = runner.poll(number)
        ended.state, ended.update = update.state, update
        ended.events += update.events
        ended.states.append(update.state)
        on_update(update)
        time.sleep(0.02)
    return ended


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def poll_until_running(runner: Runner, number: int) -> None:
    wait_until(lambda: runner.poll(number).state is RunState.RUNNING)
