"""A trial between ask and tell, as the scheduler holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import TrialState

from service.ledger import split_stay
from service.runners.base import RunState, Update
from service.status import RunningTrial
from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult


@dataclass
class Run:
    """What the scheduler knows of one trial in flight."""

    spec: TrialSpec
    trial: optuna.Trial
    asked_at: float = 0.0
    submitted_at: float = 0.0
    """0 = never, by this driver."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """The latest of each filter."""
    state: RunState = RunState.STARTING
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Step records, oldest first."""
    started_at: float | None = None
    """When the budget clock started, by the records' wall clock."""
    saved_s: float = 0.0
    """Budget clock at which the next attempt would go on."""
    trained_until: float | None = None
    """When the last step heard of was done."""
    stop_by: float | None = None
    """When a run that was asked to stop is cancelled; None = it was not asked."""
    final: Update | None = None
    """Kept until the trial is told, since a runner says it only once."""
    num_reported: int = 0
    reported_at: float = -math.inf
    last_reported_step: int = -1
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the phases that have ended, as heard."""
    heard_at: float = 0.0
    """When its last record came, by the scheduler's clock."""
    longest_gap_s: float = 0.0
    """The most budget-clock seconds between two step records, as heard or as its steps are long."""

    @property
    def number(self) -> int:
        return self.spec.number

    @property
    def trained_s(self) -> float:
        """Seconds on the budget clock, as far as heard."""
        return float(self.steps[-1]["elapsed_s"]) if self.steps else 0.0

    @property
    def lost_s(self) -> float:
        """Seconds of training that another attempt would have to repeat."""
        return max(0.0, self.trained_s - self.saved_s)

    def units(self, seconds: float) -> float:
        """Seconds of this trial in GPU-seconds, or in worker-seconds where there is no GPU."""
        return seconds * self.spec.workers * (self.spec.gpus_per_worker or 1)

    @property
    def is_training(self) -> bool:
        """Whether it has done a step and has more to do, as far as heard."""
        return bool(self.steps) and "train" not in self.phases

    def hear(self, update: Update, now: float = math.inf) -> None:
        """Take in what a runner says, at `now` by the scheduler's clock. A worker's clock may
        differ from it: no record counts as older than the submission, nor as newer than now."""
        if update.events:
            self.heard_at = now
        self.state = update.state
        if update.state not in (RunState.STARTING, RunState.RUNNING):
            self.final = update
        for event in update.events:
            at = min(max(event["time"], self.submitted_at), now)
            if event["kind"] == "step":
                self._note_gap(event)
                self.steps.append({**event, "train_loss": number(event["train_loss"])})
                self.trained_until = at
                if self.started_at is None:
                    self.started_at = max(at - event["elapsed_s"], self.submitted_at)
            elif event["kind"] == "saved":
                self.saved_s = float(event["elapsed_s"])
            elif event["kind"] == "phase":
                self.phases[event["name"]] = float(event["seconds"])
                if event["name"] == "train":
                    self.trained_until = at

    def _note_gap(self, event: dict[str, Any]) -> None:
        steps_s = self.spec.config.runtime.log_every * event.get("step_ms", 0.0) / 1000
        gap_s = float(event["elapsed_s"]) - max(self.trained_s, self.saved_s)
        self.longest_gap_s = max(self.longest_gap_s, steps_s, gap_s)

    def held(self, now: float) -> float:
        """GPU-seconds that this attempt has held its gang."""
        return self.units(max(0.0, now - self.submitted_at)) if self.submitted_at else 0.0

    def ledger(self, result: TrainResult | None, now: float) -> dict[str, float]:
        """GPU-seconds of this attempt by word; of a run that an earlier driver submitted, what it
        measured itself."""
        phases = result.phases if result is not None else {**self.phases}
        if result is None and "train" not in phases:
            phases["train"] = self.trained_s
        held_s = now - self.submitted_at if self.submitted_at else sum(phases.values())
        started = self.started_at - self.submitted_at if self.started_at else None
        known = None if not self.submitted_at else started
        words = split_stay(max(0.0, held_s), phases, known)
        return {word: self.units(seconds) for word, seconds in words.items()}

    def again(self) -> Run:
        """The next attempt of the same trial."""
        spec = replace(self.spec, attempt=self.spec.attempt + 1)
        forecasts = {name: verdict for name, verdict in self.verdicts.items() if verdict.predicted}
        return Run(
            spec,
            self.trial,
            self.asked_at,
            verdicts=forecasts,
            last_reported_step=self.last_reported_step,
        )

    def judge(self, verdicts: Iterable[Verdict]) -> None:
        """Keep verdicts, later over earlier."""
        self.verdicts.update({verdict.name: verdict for verdict in verdicts})

    def spent_and_saved(self, state: TrialState, result: TrainResult | None) -> tuple[float, float]:
        """Seconds of the training budget that were used, and those that an early end left."""
        spent_s = self.trained_s if result is None else result.phases.get("train", 0.0)
        budget_s = self.spec.config.budget.train_seconds or 0.0
        saved_s = max(0.0, budget_s - spent_s) if state == TrialState.PRUNED else 0.0
        return spent_s, saved_s

    def timings(self, now: float) -> dict[str, float]:
        """What the service itself costs a trial, in seconds, as far as it is known."""
        known = {}
        if self.started_at is not None and self.asked_at:
            known["seconds_ask_to_first_step"] = self.started_at - self.asked_at
        if self.trained_until is not None:
            known["seconds_last_step_to_tell"] = now - self.trained_until
        return known

    def row(self, word: str | None = None) -> RunningTrial:
        """For the live table; `word` says what the trial waits for."""
        last = self.steps[-1] if self.steps else {}
        loss = last.get("train_loss")
        stopping = "stopping" if self.stop_by is not None else self.state.value
        return RunningTrial(
            number=self.number,
            params=dict(self.trial.params),
            state=word or stopping,
            attempt=self.spec.attempt,
            step=last.get("step"),
            elapsed_s=last.get("elapsed_s"),
            train_seconds=self.spec.config.budget.train_seconds,
            train_loss=loss if loss is not None and math.isfinite(loss) else None,
            verdicts={
                verdict.name: verdict.value / verdict.bound
                for verdict in self.verdicts.values()
                if verdict.bound > 0 and math.isfinite(verdict.value)
            },
        )


def number(value: float | str | None) -> float:
    """A number of a record; what JSON cannot hold comes as its name, or as null."""
    return math.nan if value is None else float(value)
