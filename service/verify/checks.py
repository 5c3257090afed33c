"""One line of a verification: what was looked at, what was found, and what it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Value = float | int | str | None


@dataclass(frozen=True)
class Check:
    """A check and its outcome."""

    name: str
    ok: bool | None
    """None: could not be checked, and `value` says why."""
    value: Value
    bound: Value
    reason: str = ""
    """For a person: where the numbers come from, or what to do."""

    def to_dict(self) -> dict[str, Any]:
        """As --json gives it."""
        return {"name": self.name, "ok": self.ok, "value": self.value, "bound": self.bound}


def at_most(name: str, value: float, bound: float, reason: str = "") -> Check:
    """Holds when value <= bound; a value that is no number does not."""
    return Check(name, value <= bound, value if math.isfinite(value) else None, bound, reason)


def equal(name: str, value: Value, bound: Value, reason: str = "") -> Check:
    """Holds when both are the same."""
    return Check(name, value == bound, value, bound, reason)


def unchecked(name: str, why: str, bound: Value = None) -> Check:
    """What could not be looked at."""
    return Check(name, None, f"not checked: {why}", bound)


def failed(name: str, what: str, bound: Value = None, reason: str = "") -> Check:
    """What is wrong, in words."""
    return Check(name, False, what, bound, reason)
