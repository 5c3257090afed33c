"""Techniques that published runs used and some tracks forbid: the one table of them.

They exist so that those runs can be replayed. A run that has one switched on says so in
TrainResult.illegal, and is infeasible on the tracks named here. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import TrainConfig

GOLF_TRACKS = ("golf-10min-16mb", "golf-unlimited-16mb", "laptop")
"""Tracks with the golf rules: a validation token may be used only after it is scored."""


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
            "data.train_split trains on validation text before it is scored (parameter-golf #675)",
            lambda config: config.data.train_split != "train",
        ),
        Illegal(
            "naive_ttt",
            GOLF_TRACKS,
            "evaluate.naive_ttt_epochs trains on validation tokens before their loss is recorded",
            lambda config: config.evaluate.naive_ttt_epochs > 0,
        ),
        Illegal(
            "ngram_cache",
            GOLF_TRACKS,
            "evaluate.ngram_weight mixes only the target's probability with hashed counts, so the "
            "result is no distribution over the vocabulary, and its gate looks at the target",
            lambda config: config.evaluate.ngram_weight > 0,
        ),
    )
}


def illegal_in_use(config: TrainConfig) -> dict[str, list[str]]:
    """Techniques of the table that a run uses: name -> tracks that forbid it."""
    return {name: list(entry.tracks) for name, entry in ILLEGAL.items() if entry.in_use(config)}
