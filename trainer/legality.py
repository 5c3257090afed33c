"""The one table of published techniques that break the rules of some track.

They exist so that published runs can be replayed. A run that uses one says so in
TrainResult.illegal, and is infeasible on the tracks named. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import TrainConfig

GOLF_TRACKS = ("golf-10min-16mb", "golf-unlimited-16mb")


@dataclass(frozen=True)
class Illegal:
    """A technique and where it is forbidden."""

    name: str
    tracks: tuple[str, ...]
    """Names of the tracks that forbid it."""
    reason: str
    """The rule that it breaks, in a sentence."""
    in_use: Callable[[TrainConfig], bool]


ILLEGAL: dict[str, Illegal] = {
    technique.name: technique
    for technique in (
        Illegal(
            "validation_training",
            GOLF_TRACKS,
            "data.train_split trains on validation tokens before they are scored",
            lambda config: config.data.train_split != "train",
        ),
    )
}


def illegal_in_use(config: TrainConfig) -> dict[str, list[str]]:
    """Techniques of the table that a run uses: name -> tracks that forbid it."""
    return {name: list(entry.tracks) for name, entry in ILLEGAL.items() if entry.in_use(config)}
