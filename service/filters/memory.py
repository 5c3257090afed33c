"""Out of memory: the device, or the host, told us that the configuration does not fit."""

from __future__ import annotations

from service.trial import Verdict

HOST_MARKS = ("the host ran out of memory", "MemoryError: ", "can't allocate memory")
"""How a runner, Python and torch word that it was the host's memory, not the device's."""
REMEDY = {
    "device": "lower data.micro_batch_tokens or the model's size",
    "host": "run fewer trials at once on a node, or lower the model's size",
}


def out_of_memory(error: str) -> Verdict:
    """The verdict on a run that the device's memory ended; its value counts such ends."""
    lines = error.strip().splitlines() or ["no details"]
    line = lines[-1 if lines[0].startswith("Traceback") else 0][:300]
    where = "host" if any(mark in line for mark in HOST_MARKS) else "device"
    if "OutOfMemoryError" in line:
        where = "device"
    reason = f"the configuration does not fit the {where}'s memory: {line}; {REMEDY[where]}"
    return Verdict("memory", 1, 0, "out-of-memory errors", False, reason, predicted=False)
