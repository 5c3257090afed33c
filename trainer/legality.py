"""Techniques that published runs used and some tracks forbid: the one table of them.

They exist so that those runs can be replayed. A run that has one switched on says so in
TrainResult.illegal, and is infeasible on the tracks named here. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import TrainConfig

GOLF = ("golf-10min-16mb", "golf-unlimited-16mb", "laptop")
"""Tracks with the golf rules: a validation token may be used only after it is scored."""


@dataclass(frozen=True)
class IllegalTechnique:
    """A row: what it is called, where it is forbidden and why, and how to see it."""

    name: str
    forbidden_on: tuple[str, ...]
    """Names of tracks."""
    reason: str
    in_use: Callable[[TrainConfig], bool]


ILLEGAL: tuple[IllegalTechnique, ...] = (
    IllegalTechnique(
        "validation_training",
        GOLF,
        "data.train_split trains on validation text before it is scored (parameter-golf #675)",
        lambda config: config.data.train_split != "train",
    ),
)


def illegal_techniques(config: TrainConfig) -> dict[str, list[str]]:
    """The techniques that this run uses and some track forbids: name -> tracks."""
    return {row.name: list(row.forbidden_on) for row in ILLEGAL if row.in_use(config)}
