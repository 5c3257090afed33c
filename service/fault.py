"""A difference between what a study's storage, folders and mirrors should hold and what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what mends it."""

    trial: int | None
    """None = not of one trial."""
    where: str
    """"storage", "folder", "trials.jsonl" or "mlflow"."""
    what: str
    remedy: str
    """What is done about it; why nothing can be, where `mend` is None."""
    mend: Callable[[], object] | None = None
