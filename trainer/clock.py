"""The budget clock: seconds per phase, and the decision to start one more step or not.

What counts against the training cap is the time between `start` and `stop`, without pauses, on the
slowest rank. Published scripts look at the clock after a step and so pass the cap by up to a step;
here a step is started only when its predicted end lies before the cap. All ranks decide alike,
because the decision is made on maxima over ranks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer.distributed import Group

RECENT_STEPS = 32
"""The slowest of this many last steps predicts the next one."""
SAFETY = 1.1
"""Factor on the predicted step, for jitter."""
NEAR_S = 0.5
"""From this long before the predicted end on, the trainer can go back by one step: a machine that
others use may hold up any step."""


@dataclass(frozen=True)
class Gate:
    """The common decision of all ranks before a step."""

    elapsed_s: float
    """Budget clock on the slowest rank."""
    stop: bool
    """Do not start the step: cap or request."""
    requested: bool
    """The stop was requested on some rank, not due to the cap."""
    near_cap: bool
    """So close to the cap that the next decision should see a drained device, and that the
    weights before the step are worth keeping."""


@dataclass
class BudgetClock:
    """Training seconds against `cap_s` (None = no cap)."""

    cap_s: float | None
    group: Group
    now: Callable[[], float] = time.perf_counter
    _spent: float = 0.0
    _since: float | None = None
    _last_completion: float | None = None
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far on the slowest rank (a collective), and the last steps' of this one."""
        return {"spent": self.group.max_float(self.elapsed()), "durations": list(self._durations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict, before the start."""
        self._spent = state["spent"]
        self._durations.extend(state["durations"])

    def expect_step(self, seconds: float) -> None:
        """A first guess of the step time, from a primed step."""
        self._durations.append(seconds)

    def start(self) -> None:
        """Start, or go on after a pause. Every rank must arrive together."""
        self.group.max_float(0.0)
        self._since = self._last_completion = self.now()

    def stop(self) -> None:
        """Stop or pause. The device must be idle."""
        self._spent = self.elapsed()
        self._since = None

    @property
    def is_running(self) -> bool:
        """Started and not paused."""
        return self._since is not None

    def elapsed(self) -> float:
        """Seconds on this rank so far."""
        return self._spent + (self.now() - self._since if self._since is not None else 0.0)

    def step_completed(self) -> float:
        """Note that one more step is done on the device; returns its seconds."""
        now = self.now()
        seconds = now - (self._last_completion if self._last_completion is not None else now)
        self._last_completion = now
        self._durations.append(seconds)
        return seconds

    def predicted_step_s(self) -> float:
        """What the next step will take at most, going by the last ones."""
        return SAFETY * max(self._durations, default=0.0)

    def gate(self, steps_in_flight: int, stop_requested: bool) -> Gate:
        """Decide with all ranks whether to start one more step (a collective).

        Args:
            steps_in_flight: steps launched on the device and not known to be done.
            stop_requested: this rank was asked to stop.
        """
        elapsed, step, requested = self.group.max_floats(
            self.elapsed(), self.predicted_step_s(), float(stop_requested)
        )
        end = elapsed + step * (steps_in_flight + 1)
        over = self.cap_s is not None and end > self.cap_s
        near = self.cap_s is not None and end + 2 * step + NEAR_S > self.cap_s
        return Gate(elapsed, over or requested > 0, requested > 0, near)


class PhaseTimer:
    """Seconds per named phase of a run, device included; phases may be entered repeatedly."""

    def __init__(
        self,
        synchronize: Callable[[], None],
        on_end: Callable[[str, float], None] = lambda name, seconds: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._on_end = on_end
        self._now = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block, waiting for the device at both ends."""
        self._synchronize()
        start = self._now()
        yield
        self._synchronize()
        self.add(name, self._now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Book seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._on_end(name, seconds)
