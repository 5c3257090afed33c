"""Writes a trial down: its folder, its attributes and constraints in the storage, the trackers.

The one place where a trial's life leaves traces, in an order that survives a kill at any point:
files before attributes, attributes before constraints, constraints before tell, tell before the
trackers, and last of all told.json, which says that nothing is left to do.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from service.attachments import attach
from service.driver_storage import batch
from service.filters.configuration import build_config
from service.ledger import LEDGER_ATTR, WASTED_ATTR
from service.runners.base import Demand
from service.study import write_constraints
from service.tracking.base import Tracker
from service.tracking.outcome import REJECTED, Outcome, outcome_of
from service.trial import TrialFolder, TrialSpec, Verdict, write_json
from trainer.config import TrainConfig
from trainer.report import TrainResult

logger = logging.getLogger(__name__)
TOLD_FILE = "told.json"
MAX_ERROR_CHARS = 4000
PROBE_BYTES = 16384
"""Room that a trial's records need at the least."""


@dataclass(frozen=True)
class Ending:
    """How a trial ended."""

    state: TrialState
    verdicts: tuple[Verdict, ...] = ()
    result: TrainResult | None = None
    value: float | None = None
    """Bits per byte; only for COMPLETE."""
    error: str | None = None
    """Only for FAIL."""
    spent_s: float = 0.0
    """Worker- or GPU-seconds of training in this last attempt."""
    saved_s: float = 0.0
    """The part of the training budget that was not used, for rejected and stopped trials."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Attribute name -> seconds."""
    ledger: Mapping[str, float] = field(default_factory=dict)
    """As service.ledger has it; empty for a trial that held no GPU."""
    wasted_s: float = 0.0
    """GPU-seconds that the last attempt held for nothing."""
    held_s: float = 0.0
    """Seconds that the last attempt held its gang."""
    duplicate_of: int | None = None


class TrialBook:
    """Keeps the records of one study.

    Args:
        study: The study.
        base: The recipe's configuration.
        recipe: Its name.
        overrides: Settings of every trial: the track's budgets, the user's.
        study_dir: Folder of the trial folders.
        demand_of: Workers of a trial, by its number.
        provenance: What every provenance.json holds.
        trackers: Mirrors; one that raises is reported and never stops the sweep.
        clock: Wall-clock seconds.
    """

    def __init__(
        self,
        study: optuna.Study,
        base: TrainConfig,
        recipe: str,
        overrides: Mapping[str, Any],
        study_dir: Path,
        demand_of: Callable[[int], Demand],
        provenance: Mapping[str, Any],
        trackers: Sequence[Tracker],
        clock: Callable[[], float],
    ) -> None:
        self._study = study
        self._base = base
        self._recipe = recipe
        self._overrides = dict(overrides)
        self._study_dir = study_dir
        self._demand_of = demand_of
        self._provenance = dict(provenance)
        self._trackers = list(trackers)
        self._clock = clock

    def specify(self, number: int, params: Mapping[str, Any]) -> tuple[TrialSpec, Verdict | None]:
        """What a proposal means; with the verdict that rejects it when it is no valid setting."""
        asked = {**self._overrides, **params}
        config, fault = build_config(self._base, asked)
        overrides = config.difference(self._base) if fault is None else asked
        folder = self.folder(number).path
        demand = self._demand_of(number)
        spec = TrialSpec(
            study=self._study.study_name,
            number=number,
            recipe=self._recipe,
            overrides=overrides,
            config=config,
            folder=folder,
            workers=demand.workers,
            gpus_per_worker=demand.gpus_per_worker,
        )
        return spec, fault

    def check_disk(self) -> None:
        """Raises OSError when the study's disk has no room for the files of a trial."""
        probe = self._study_dir / ".room"
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)

    def folder(self, number: int) -> TrialFolder:
        """Where a trial's files are."""
        return TrialFolder(trial_folder(self._study_dir, number))

    def open(self, spec: TrialSpec, trial: optuna.Trial, verdicts: Sequence[Verdict]) -> None:
        """Before launch, or before a rejected trial is told."""
        folder = TrialFolder(spec.folder)
        spec.folder.mkdir(parents=True, exist_ok=True)
        folder.clear_run()
        for leftover in (folder.verdicts, spec.folder / TOLD_FILE):
            leftover.unlink(missing_ok=True)
        write_json(folder.config, spec.config.to_dict())
        own = {"study": spec.study, "number": spec.number, "recipe": spec.recipe}
        own |= {"overrides": spec.overrides, "digest": spec.digest}
        write_json(folder.provenance, {**own, **self._provenance})
        attrs: dict[str, Any] = {"digest": spec.digest}
        for verdict in verdicts:
            if verdict.predicted:
                attrs[f"predicted.{verdict.name}"] = verdict.value
        with batch(self._study):
            _set_attrs(trial, attrs)
        self._notify(lambda tracker: tracker.trial_started(spec))

    def retry(
        self,
        spec: TrialSpec,
        trial: optuna.Trial,
        error: str,
        spent_s: float,
        held_s: float = 0.0,
    ) -> None:
        """Before another attempt of a failed run; keeps the failed attempt's log."""
        folder = TrialFolder(spec.folder)
        failed = spec.attempt - 1
        if folder.log.exists():
            folder.log.replace(spec.folder / f"train.attempt-{failed}.log")
        folder.clear_run()
        self.note_spent(trial, spent_s, held_s)
        error = error[-MAX_ERROR_CHARS:]
        _set_attrs(trial, {"attempt": spec.attempt, f"error.attempt-{failed}": error})
        self._notify(lambda tracker: tracker.trial_started(spec))

    def launch(self, spec: TrialSpec) -> None:
        """At submission: from now on the trial counts as launched, whatever becomes of it."""
        TrialFolder(spec.folder).metrics.touch()

    def note_spent(self, trial: optuna.Trial, spent_s: float, held_s: float = 0.0) -> None:
        """Account for an attempt that led to no end: its training, and how long it held GPUs."""
        if held_s > 0:
            before = trial.user_attrs.get(WASTED_ATTR, 0.0)
            _set_attrs(trial, {WASTED_ATTR: before + held_s})
        if spent_s > 0:
            before = trial.user_attrs.get("spent_before_s", 0.0)
            _set_attrs(trial, {"spent_before_s": before + spent_s})

    def heard(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        """New metric records."""
        self._notify(lambda tracker: tracker.trial_events(spec, events))

    def close(self, spec: TrialSpec, trial: optuna.Trial, ending: Ending) -> str:
        """Tell a trial. May be called again after a crash or a storage outage in between.

        Returns:
            The verdict in words, as in service.tracking.outcome.
        """
        spec.folder.mkdir(parents=True, exist_ok=True)
        folder = TrialFolder(spec.folder)
        verdicts = settle(ending.verdicts)
        folder.write_verdicts(verdicts)
        launched = ending.result is not None or folder.metrics.exists()
        outcome = outcome_of(ending.state.name, verdicts, launched)
        if not _is_told(self._study, trial):
            self._tell(spec, trial, ending, verdicts, outcome)
        self._mirror(spec, ending.state.name, verdicts, ending.result)
        return outcome.verdict

    def _tell(
        self,
        spec: TrialSpec,
        trial: optuna.Trial,
        ending: Ending,
        verdicts: Sequence[Verdict],
        outcome: Outcome,
    ) -> None:
        reason = outcome.reason or gist(ending.error)
        attrs: dict[str, Any] = {"verdict": outcome.verdict, "reason": reason}
        attrs |= _result_attrs(ending.result)
        attrs |= {"spent_s": ending.spent_s, "saved_s": ending.saved_s, **ending.timings}
        if ending.ledger:
            attrs[LEDGER_ATTR] = dict(ending.ledger)
        if ending.wasted_s:
            attrs[WASTED_ATTR] = trial.user_attrs.get(WASTED_ATTR, 0.0) + ending.wasted_s
        broken = [verdict.name for verdict in verdicts if not verdict.ok]
        if broken:
            attrs["filter"] = broken[0]
        if ending.error is not None:
            attrs["error"] = ending.error[-MAX_ERROR_CHARS:]
        if ending.duplicate_of is not None:
            attrs["duplicate_of"] = ending.duplicate_of
        with batch(self._study):
            _set_attrs(trial, attrs)
            if outcome.verdict != REJECTED:
                attach(self._study, trial, spec.folder)
            if ending.state != TrialState.FAIL:
                write_constraints(self._study, trial, verdicts)
        self._study.tell(trial, ending.value, ending.state)

    def copy_end(self, spec: TrialSpec, earlier: FrozenTrial) -> Ending:
        """The end of a trial that computes what `earlier` computed: the same, at no cost."""
        theirs = self.folder(earlier.number)
        result = None
        if earlier.state == TrialState.COMPLETE and theirs.result.exists():
            shutil.copy(theirs.result, TrialFolder(spec.folder).result)
            result = theirs.read_result()
        return Ending(
            state=earlier.state,
            verdicts=tuple(theirs.read_verdicts()),
            result=result,
            value=earlier.value if earlier.state == TrialState.COMPLETE else None,
            duplicate_of=earlier.number,
        )

    def catch_up(self, trial: FrozenTrial) -> None:
        """Mirror a told trial whose driver died before the trackers heard of it."""
        folder = self.folder(trial.number)
        if folder.path.exists() and not (folder.path / TOLD_FILE).exists():
            spec, _ = self.specify(trial.number, trial.params)
            self._mirror(spec, trial.state.name, folder.read_verdicts(), folder.read_result())

    def seed_of(self, number: int) -> int:
        """The seed that a trial has, where its folder is at hand; else the recipe's."""
        config = self.folder(number).config
        if not config.exists():
            return self._base.runtime.seed
        return int(json.loads(config.read_text())["runtime"]["seed"])

    def read_run(self, number: int) -> tuple[TrainConfig, TrainResult] | None:
        """Configuration and result of a finished run, where its folder is at hand."""
        folder = self.folder(number)
        result = folder.read_result()
        if result is None or not folder.config.exists():
            return None
        return TrainConfig.from_dict(json.loads(folder.config.read_text())), result

    def _mirror(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        self._notify(lambda tracker: tracker.trial_ended(spec, state, verdicts, result))
        write_json(spec.folder / TOLD_FILE, {"state": state, "time": self._clock()})

    def _notify(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:  # a mirror must never stop the sweep
                logger.warning("%s: %s; the sweep goes on", type(tracker).__name__, error)


def trial_folder(study_dir: Path, number: int) -> Path:
    """The folder of a trial: STUDY/trial-00007."""
    return study_dir / f"trial-{number:05d}"


def settle(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict per name: measured before forecast, later before earlier."""
    last: dict[str, Verdict] = {}
    for verdict in verdicts:
        if verdict.name not in last or last[verdict.name].predicted or not verdict.predicted:
            last[verdict.name] = verdict
    return list(last.values())


def stop_verdict(trial: optuna.Trial) -> Verdict | None:
    """The verdict for which the run was asked to stop, by this driver or an earlier one."""
    fields = trial.user_attrs.get("stop_verdict")
    return Verdict(**fields) if fields else None


def note_stop(trial: optuna.Trial, verdict: Verdict) -> None:
    """Remember why a run is asked to stop, before it is asked."""
    _set_attrs(trial, {"stop_verdict": asdict(verdict)})


def _is_told(study: optuna.Study, trial: optuna.Trial) -> bool:
    return study._storage.get_trial(trial._trial_id).state.is_finished()


def _result_attrs(result: TrainResult | None) -> dict[str, Any]:
    """What people sort by in the dashboard; the rest is in result.json."""
    if result is None:
        return {}
    attrs = {
        "steps": result.steps,
        "train_seconds": result.phases.get("train"),
        "eval_seconds": result.phases.get("evaluate"),
        "bytes_total": result.bytes_total,
    }
    return {name: value for name, value in attrs.items() if value is not None}


def _set_attrs(trial: optuna.Trial, attrs: Mapping[str, Any]) -> None:
    """Write what is not written yet: every attribute costs a transaction."""
    known = trial.user_attrs
    for name, value in attrs.items():
        if name not in known or known[name] != value:
            trial.set_user_attr(name, value)


def gist(error: str | None) -> str:
    """The line of an error that says what is wrong: the first, but of a traceback the last."""
    lines = (error or "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0][:500]
