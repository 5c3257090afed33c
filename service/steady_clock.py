"""A wall clock that nobody can put forward or back while a driver runs.

Budgets, graces and the ledger measure how long something took. Measured by the machine's own clock,
a correction of an hour would declare every run hung and book an hour that nobody worked.
"""

from __future__ import annotations

import time


class SteadyClock:
    """Unix seconds as they were when this was made, plus what has passed since."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Unix seconds; never goes back."""
        return time.monotonic() + self._offset
