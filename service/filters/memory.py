"""Out of memory: the device told us that the configuration does not fit."""

from __future__ import annotations

from service.trial import Verdict


def out_of_memory(error: str) -> Verdict:
    """The verdict on a run that the device's memory ended; its value counts such ends."""
    line = error.strip().splitlines()[-1][:300] if error.strip() else "no details"
    reason = f"the configuration does not fit the device's memory: {line}"
    return Verdict("memory", 1, 0, "out-of-memory errors", False, reason, predicted=False)
