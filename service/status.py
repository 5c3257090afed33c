"""Where a sweep stands: one snapshot for the live table, `caddie sweep status` and the final words.

Computed from the storage alone, so any process may ask; the driver adds what only it knows of the
trials that run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from service.lease import is_alive, read_lease
from service.ledger import LEDGER_ATTR, add_up
from service.study import CONFIRMS, frozen_trials
from service.tracking.outcome import FEASIBLE, REJECTED, STOPPED

MAX_MISFITS = 3


@dataclass(frozen=True)
class BestTrial:
    """The feasible trial with the lowest bits per byte."""

    number: int
    value: float
    params: dict[str, Any]


@dataclass(frozen=True)
class RunningTrial:
    """A trial that is being tried now."""

    number: int
    params: dict[str, Any]
    state: str = "running"
    """"starting", "running", "stopping", "retrying" or "waiting" (for a trial it equals)."""
    attempt: int = 1
    step: int | None = None
    elapsed_s: float | None = None
    """Of the budget clock."""
    train_seconds: float | None = None
    """The budget; None = no limit."""
    train_loss: float | None = None
    verdicts: dict[str, float] = field(default_factory=dict)
    """Filter -> share of its bound that is measured or forecast; above 1 = over it."""


@dataclass(frozen=True)
class Misfit:
    """A trial that did not make it, and why."""

    number: int
    verdict: str
    """As in service.tracking.outcome."""
    reason: str


@dataclass(frozen=True)
class WorkSeconds:
    """GPU-seconds, or worker-seconds where there is no GPU, of ended trials."""

    spent: float = 0.0
    """Training that was done, failed and interrupted attempts included."""
    saved_before_launch: float = 0.0
    """Training budgets of the trials that were rejected."""
    saved_while_running: float = 0.0
    """What was left of the training budgets of the trials that were stopped."""
    unit: str = "worker-seconds"
    queue: float = 0.0
    """From here to `wasted`: where all of it went, every GPU of the cluster, every second of the
    drivers. Held by no trial."""
    start: float = 0.0
    """From submission to the trial's first own work."""
    compile: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    pack: float = 0.0
    teardown: float = 0.0
    """What a stay holds beside the rest: from the last byte to the scheduler's knowing of it."""
    wasted: float = 0.0
    """Attempts that failed or were interrupted."""
    running: float = 0.0
    """Of trials that have not ended."""
    total: float = 0.0
    """The sum of the nine above: GPUs times wall time."""

    @property
    def saved(self) -> float:
        """By rejecting and by stopping."""
        return self.saved_before_launch + self.saved_while_running


@dataclass(frozen=True)
class SweepStatus:
    """A snapshot of a study."""

    study: str
    space: str
    track: str
    states: dict[str, int]
    """COMPLETE, PRUNED, FAIL, RUNNING, WAITING -> number of trials."""
    num_trials: int | None
    """How many COMPLETE and PRUNED trials the last driver was asked for."""
    rejected_before_launch: int
    stopped_while_running: int
    feasible: int
    ended_by: dict[str, int]
    """Filter -> trials it rejected, stopped or made infeasible."""
    best: BestTrial | None
    running: list[RunningTrial]
    gpu_seconds: WorkSeconds
    driver: str | None
    """"pid on host" of the live driver; None = nobody works on the study."""
    ending: str | None = field(default=None)
    """Why no more trials are asked for; None while they are."""
    confirming_seeds: int = 0
    """COMPLETE and PRUNED trials that `caddie confirm` ran."""
    latest_misfits: list[Misfit] = field(default_factory=list)
    """The last few trials that were rejected, stopped, infeasible or failed; newest first."""

    @property
    def told(self) -> int:
        """Trials that count towards num_trials."""
        return self.states["COMPLETE"] + self.states["PRUNED"] - self.confirming_seeds

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `caddie sweep status`."""
        return asdict(self)


def status_of(
    study: optuna.Study,
    *,
    running: Sequence[RunningTrial] | None = None,
    now: float | None = None,
) -> SweepStatus:
    """Count a study's trials as the storage has them.

    Args:
        study: Open study.
        running: What the driver knows of its trials; None = take it from the storage.
        now: Wall-clock seconds.
    """
    trials = frozen_trials(study)
    attrs = study.user_attrs
    fates = Counter(trial.user_attrs.get("verdict") for trial in trials if _has_ended(trial))
    lease = read_lease(study)
    alive = lease is not None and is_alive(lease, time.time() if now is None else now)
    return SweepStatus(
        study=study.study_name,
        space=attrs.get("space", "?"),
        track=attrs.get("track", "?"),
        states={state.name: _count(trials, state) for state in _STATES},
        num_trials=attrs.get("num_trials"),
        rejected_before_launch=fates[REJECTED],
        stopped_while_running=fates[STOPPED],
        feasible=fates[FEASIBLE],
        ended_by=dict(Counter(name for trial in trials if (name := _ended_by(trial)))),
        best=best_of(trials),
        running=_stored_running(trials) if running is None else list(running),
        gpu_seconds=_seconds(trials, attrs),
        driver=f"{lease.pid} on {lease.host}" if lease is not None and alive else None,
        ending=attrs.get("ending"),
        confirming_seeds=sum(
            CONFIRMS in trial.user_attrs for trial in trials if trial.state in _TOLD
        ),
        latest_misfits=_latest_misfits(trials),
    )


def best_of(trials: Sequence[FrozenTrial]) -> BestTrial | None:
    """The feasible trial with the lowest value, the earliest of equals."""
    feasible = [
        (trial.value, trial.number, trial.params)
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.value is not None
        and trial.user_attrs.get("verdict") == FEASIBLE
    ]
    if not feasible:
        return None
    value, number, params = min(feasible, key=lambda row: row[:2])
    return BestTrial(number, value, dict(params))


_STATES = (
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.FAIL,
    TrialState.RUNNING,
    TrialState.WAITING,
)
_TOLD = (TrialState.COMPLETE, TrialState.PRUNED)


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.state.is_finished()


def _count(trials: Sequence[FrozenTrial], state: TrialState) -> int:
    return sum(trial.state == state for trial in trials)


def _ended_by(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("filter") if _has_ended(trial) else None


def _latest_misfits(trials: Sequence[FrozenTrial]) -> list[Misfit]:
    ended = [
        trial
        for trial in trials
        if _has_ended(trial) and trial.user_attrs.get("verdict", FEASIBLE) != FEASIBLE
    ]
    ended.sort(key=lambda trial: (trial.datetime_complete or datetime.min, trial.number))
    return [
        Misfit(trial.number, trial.user_attrs["verdict"], trial.user_attrs.get("reason", ""))
        for trial in ended[: -MAX_MISFITS - 1 : -1]
    ]


def _stored_running(trials: Sequence[FrozenTrial]) -> list[RunningTrial]:
    rows = []
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            step = trial.last_step
            rows.append(
                RunningTrial(
                    number=trial.number,
                    params=dict(trial.params),
                    attempt=trial.user_attrs.get("attempt", 1),
                    step=step,
                    train_loss=None if step is None else trial.intermediate_values[step],
                )
            )
    return rows


def _seconds(trials: Sequence[FrozenTrial], attrs: Mapping[str, Any]) -> WorkSeconds:
    unit = attrs.get("unit", "worker-seconds")
    ledger = add_up(attrs.get(LEDGER_ATTR), [trial.user_attrs for trial in trials])
    spent, saved = 0.0, Counter[str]()
    for trial in trials:
        spent += trial.user_attrs.get("spent_s", 0.0) + trial.user_attrs.get("spent_before_s", 0.0)
        if _has_ended(trial):
            saved[trial.user_attrs.get("verdict", "")] += trial.user_attrs.get("saved_s", 0.0)
    return WorkSeconds(spent, float(saved[REJECTED]), float(saved[STOPPED]), unit, **ledger)
