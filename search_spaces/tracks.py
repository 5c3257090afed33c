"""Tracks: named sets of budgets and rules. Numbers only; filters judge by them.

A user's own track is a table `[tracks.NAME]` in caddie.toml with the fields of `Track`.
"""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config import BudgetConfig, Settings


class Track(Settings):
    """Budgets of a competition or a machine. None = no limit."""

    name: str
    artifact_bytes: PositiveInt | None = None
    """Packed code plus packed model, decimal bytes."""
    train_seconds: PositiveFloat | None = None
    """Seconds of training, calibration included, on the track's hardware."""
    eval_seconds: PositiveFloat | None = None
    """Seconds for everything that produces the score."""
    train_tokens: PositiveInt | None = None
    """Distinct training tokens that may be used, any number of times."""
    min_steps: NonNegativeInt = 0
    """A run that makes fewer steps than this is worthless and is stopped early; 0 = off."""
    hardware: str = "any"
    """Where the seconds count."""
    rules: str = ""
    """What evaluation may use."""
    record: str = "none"
    """What makes a result a record."""
    not_counted: tuple[str, ...] = ()
    """What the training clock leaves out, beyond what every track does."""

    def budget(self) -> BudgetConfig:
        """The budget group of a run on this track."""
        return BudgetConfig(
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            artifact_bytes=self.artifact_bytes,
            train_tokens=self.train_tokens,
            min_steps=self.min_steps,
        )


GOLF_RULES = (
    "no training data at evaluation; validation tokens only after they are scored; one pass"
)


def _slowrun(name: str, minutes: int) -> Track:
    return Track(
        name=name,
        train_seconds=60.0 * minutes,
        train_tokens=100_000_000,
        hardware="8xH100",
        rules=SLOWRUN_RULES,
        record="lower validation loss in nats per token, one run; equal runs differ by 0.0005, "
        "seeds by 0.002",
        not_counted=SLOWRUN_NOT_COUNTED,
    )


SLOWRUN_RULES = "any method and any number of epochs; evaluation is neither timed nor capped"
SLOWRUN_NOT_COUNTED = (
    "start-up",
    "the first steps after every compilation",
    "evaluation during the run and after it",
    "writing of checkpoints",
    "the final evaluation of ensembles",
)
"""Published clocks count training steps only (main of 2026-07-03). Ours leaves out the same: graphs
are primed before it starts, and validation and saving stop it."""

TRACKS: dict[str, Track] = {
    track.name: track
    for track in (
        Track(
            name="golf-10min-16mb",
            artifact_bytes=16_000_000,
            train_seconds=600.0,
            eval_seconds=600.0,
            hardware="8xH100",
            rules=GOLF_RULES,
            record="at least 0.005 nats better, p < 0.01 over seeds of one configuration",
        ),
        Track(
            name="golf-unlimited-16mb",
            artifact_bytes=16_000_000,
            rules=GOLF_RULES,
        ),
        Track(
            name="laptop",
            artifact_bytes=200_000,
            train_seconds=8.0,
            eval_seconds=30.0,
            min_steps=20,
            hardware="two CPU cores",
            rules=GOLF_RULES,
            record="as golf, on its own scale",
        ),
        _slowrun("slowrun-tiny", 15),
        _slowrun("slowrun-1h", 60),
        _slowrun("slowrun-2h", 120),
    )
}
