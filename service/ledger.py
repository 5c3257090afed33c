"""Where the GPU-seconds of a sweep went: every GPU, every second, one word each.

A trial's stay on its GPUs is split by what the trial itself measured; what no trial held is
`queue`. Seconds are of GPUs, or of workers where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEDGER_ATTR = "ledger"
"""Of a trial: word -> GPU-seconds of its last attempt. Of a study: what `Meter` counts."""
WASTED_ATTR = "wasted_s"
"""Of a trial: GPU-seconds of its failed and interrupted attempts."""
PHASES = {
    "build": "compile",
    "restore": "compile",
    "prime": "compile",
    "train": "train",
    "calibrate": "train",
    "validate": "evaluate",
    "evaluate": "evaluate",
    "evaluate_trained": "evaluate",
    "evaluate_prequant": "evaluate",
    "evaluate_stages": "evaluate",
    "average": "pack",
    "checkpoint": "pack",
    "quantize": "pack",
    "pack": "pack",
}
"""Phase of trainer.report.TrainResult -> word; a phase that is not here counts as `pack`."""
WORDS = ("queue", "start", "compile", "train", "evaluate", "pack", "teardown", "wasted")


def split_stay(
    held_s: float, phases: Mapping[str, float], until_training_s: float | None
) -> dict[str, float]:
    """Seconds of one attempt by word; they add up to `held_s`.

    Args:
        held_s: From submission until the scheduler knew of the end.
        phases: Seconds that the trial measured.
        until_training_s: From submission to the start of the budget clock; None = it never started.
    """
    words = dict.fromkeys(WORDS[1:-1], 0.0)
    for phase, seconds in phases.items():
        words[PHASES.get(phase, "pack")] += seconds
    if until_training_s is None:
        words["start"] = max(0.0, held_s - sum(words.values()))
    else:
        words["start"] = max(0.0, until_training_s - words["compile"])
    known = sum(words.values())
    if known > held_s > 0:  # clocks of two hosts, or phases that overlap
        return {word: seconds * held_s / known for word, seconds in words.items()}
    words["teardown"] = max(0.0, held_s - known)
    return words


@dataclass
class Meter:
    """Counts GPU-seconds as they pass, over all drivers of a study."""

    queue: float = 0.0
    """Held by no trial."""
    held: float = 0.0
    """Held by trials."""
    running: float = 0.0
    """The part of `held` that belongs to trials that have not ended."""
    _at: float | None = None

    def tick(self, now: float, capacity: float, held: float) -> None:
        """Count the time since the last tick.

        Args:
            now: Wall-clock seconds; a clock that was put back counts nothing.
            capacity: GPUs that trials could hold.
            held: GPUs that they held since the last tick.
        """
        passed = max(0.0, now - self._at) if self._at is not None else 0.0
        self._at = now
        self.held += passed * held
        self.queue += passed * max(0.0, capacity - held)

    def to_attr(self) -> dict[str, float]:
        """For the study's attribute."""
        return {"queue": self.queue, "held": self.held, "running": self.running}

    @classmethod
    def of_attr(cls, attr: Mapping[str, Any] | None) -> Meter:
        """What earlier drivers counted; their running trials run no more."""
        fields = attr or {}
        return cls(float(fields.get("queue", 0.0)), float(fields.get("held", 0.0)))


def add_up(attr: Mapping[str, Any] | None, trials: list[Mapping[str, Any]]) -> dict[str, float]:
    """The whole ledger of a study: the words, what runs now, and all of it.

    What trials held and no trial booked was lost with a driver that died: wasted.

    Args:
        attr: The study's LEDGER_ATTR.
        trials: User attributes of its trials.
    """
    words = dict.fromkeys(WORDS, 0.0)
    for attrs in trials:
        words["wasted"] += attrs.get(WASTED_ATTR, 0.0)
        for word, seconds in (attrs.get(LEDGER_ATTR) or {}).items():
            words[word] += seconds
    counted = attr or {}
    running, held = counted.get("running", 0.0), counted.get("held", 0.0)
    words["queue"] = counted.get("queue", 0.0)
    booked = sum(words.values()) - words["queue"]
    words["wasted"] += max(0.0, held - running - booked)
    return {**words, "running": running, "total": words["queue"] + held}
