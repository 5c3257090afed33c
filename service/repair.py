"""Compares a study's storage, its trial folders and its mirrors, and mends what differs.

The storage says which trials there are and how they ended; the folder says the rest. A file that
is lost is made again from what else tells it, byte for byte: config.json from the recipe and the
trial's settings (its digest must come out), verdicts.json and result.json from tracking.json or
from MLflow's copies, and those from the folder. Nothing is ever deleted from a study's folder:
what is broken is renamed to NAME.broken, what belongs to no trial is moved to `orphaned`.

Only for a study that nobody drives: with `apply` the caller holds its lease.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from service.cleaning import cleaned_files
from service.errors import UsageError
from service.fault import Fault
from service.filters import default_filters
from service.judge import Judge
from service.policies import Policy
from service.repair_files import (
    TRIALS_FILE,
    are_verdicts,
    as_json,
    entry_or_none,
    is_artifact,
    is_due,
    is_entry,
    is_json,
    is_result,
    is_row,
    move,
    put,
    read_json,
)
from service.run import Run
from service.runners.base import Demand
from service.study import frozen_trials, live_trial, requeue
from service.teller import Teller
from service.tracking.curve import curve_of
from service.tracking.jsonl_tracker import JsonlTracker, read_lines
from service.tracking.mlflow_values import run_name
from service.tracking.outbox import (
    Entry,
    close_entry,
    entry_path,
    folders_with_entries,
    open_entry,
)
from service.trial import TrialFolder, TrialSpec, Verdict
from service.trial_book import TOLD_FILE, TrialBook, trial_folder
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.report import TrainResult

ORPHANS = "orphaned"
Fetch = Callable[[Path, int, str], bytes | None]
"""(folder, trial, file name) -> the file as a mirror has it."""


@dataclass(frozen=True)
class Finding:
    """A fault, and what came of it."""

    trial: int | None
    where: str
    what: str
    remedy: str
    mended: bool
    can_mend: bool


def work_off(faults: Iterable[Fault], apply: bool) -> list[Finding]:
    """Mend faults as they are found, one after the other; or only say them."""
    findings = []
    for fault in faults:
        mended, remedy = False, fault.remedy
        if apply and fault.mend is not None:
            try:
                fault.mend()
                mended = True
            except Exception as error:  # one that cannot be mended must not hold up the others
                remedy = f"{fault.remedy}: failed, {type(error).__name__}: {error}"
        findings.append(
            Finding(fault.trial, fault.where, fault.what, remedy, mended, fault.mend is not None)
        )
    return findings


class StudyRepair:
    """Finds faults of one study's storage and folders.

    Args:
        study: Through service.driver_storage, with the lease held, when faults are mended.
        study_dir: Folder of its trial folders.
        track: Name of its track, for the filters that judge what was left behind.
        clock: Wall-clock seconds.
        fetch: A mirror's copies of files.
        apply: Whether faults will be mended; looking writes nothing.
    """

    def __init__(
        self,
        study: optuna.Study,
        study_dir: Path,
        track: str,
        clock: Callable[[], float],
        fetch: Fetch | None = None,
        apply: bool = False,
    ) -> None:
        attrs = study.user_attrs
        if attrs.get("recipe") not in RECIPES:
            raise UsageError(
                f"study {study.study_name!r} is of recipe {attrs.get('recipe')!r}, which is not "
                "known here: repair it with the version that made it"
            )
        self._study = study
        self._study_dir = study_dir
        self._recipe: str = attrs["recipe"]
        self._base = RECIPES[self._recipe].build()
        self._fetch = fetch or (lambda folder, number, name: None)
        self._clock = clock
        self._neighbour = self._some_entry()
        self._common = {
            **{f"budget.{name}": value for name, value in attrs["budget"].items()},
            **attrs["overrides"],
            **self._places(),
        }
        self._common.pop("budget.max_steps", None)
        self._common |= {k: v for k, v in attrs["overrides"].items() if k.startswith("budget.")}
        self._teller = Teller(Judge(default_filters(track=track, recipe=self._recipe)), Policy())
        self._book = TrialBook(
            study,
            self._base,
            self._recipe,
            self._common,
            study_dir,
            self._demand,
            {},
            [JsonlTracker(study_dir / TRIALS_FILE), OutboxTracker()] if apply else [],
            clock,
        )

    def faults(self) -> Iterator[Fault]:
        """Storage first, then each trial's folder, then the list of trials, then what is left."""
        yield from self._running_faults()
        for trial in frozen_trials(self._study):
            if trial.state.is_finished():
                yield from self._folder_faults(trial)
        yield from self._list_faults()
        yield from self._orphan_faults()

    # --- the storage ------------------------------------------------------------------------

    def _running_faults(self) -> Iterator[Fault]:
        for trial in frozen_trials(self._study, TrialState.RUNNING):
            spec, _ = self._book.specify(trial.number, trial.params)
            run = Run(spec, live_trial(self._study, trial.number))
            end = self._teller.ending_left_behind(run, self._clock())
            what = "it is RUNNING, and no driver lives"
            if end is None:
                mend: Callable[[], object] = partial(requeue, self._study, trial.number)
                yield Fault(trial.number, "storage", what, "put it back into the queue", mend)
            else:
                mend = partial(self._book.close, spec, run.trial, end)
                remedy = f"tell it {end.state.name}, as its folder says"
                yield Fault(trial.number, "storage", what, remedy, mend)

    # --- a trial's folder -------------------------------------------------------------------

    def _folder_faults(self, trial: FrozenTrial) -> Iterator[Fault]:
        files = TrialFolder(trial_folder(self._study_dir, trial.number))
        makers: tuple[tuple[Path, Callable[[], bytes | None], Callable[[bytes], bool]], ...] = (
            (files.config, partial(self._config, trial), partial(self._is_config, trial)),
            (entry_path(files.path), partial(self._entry, trial), partial(is_entry, trial)),
            (files.verdicts, partial(self._verdicts, trial), partial(are_verdicts, trial)),
            (files.result, partial(self._result, trial), partial(is_result, trial)),
            (files.provenance, lambda: None, is_json),
            (files.metrics, lambda: None, lambda data: True),
            (files.artifact, lambda: None, partial(is_artifact, files)),
            (files.path / TOLD_FILE, partial(self._told, trial), is_json),
            (files.path / "curve.svg", partial(self._curve, trial), partial(self._is_curve, trial)),
        )
        cleaned = cleaned_files(files.path)
        for path, make, is_right in makers:
            there = path.exists()
            if there and is_right(path.read_bytes()):
                continue
            if not there and (path.name in cleaned or not is_due(trial, path.name)):
                continue
            if path.name == "curve.svg" and make() is None:  # nothing to draw, or not yet
                continue
            yield self._file_fault(trial.number, path, make, is_right)
        for leftover in sorted(files.path.glob("*.partial")):
            what = f"{leftover.name} is half of a file that a killed process was writing"
            yield Fault(trial.number, "folder", what, "remove it", leftover.unlink)

    def _file_fault(
        self,
        number: int,
        path: Path,
        make: Callable[[], bytes | None],
        is_right: Callable[[bytes], bool],
    ) -> Fault:
        what = f"{path.name} is " + ("broken or not this trial's" if path.exists() else "missing")
        for source, data in self._copies(number, path, make):
            if data is not None and is_right(data):
                return Fault(
                    number, "folder", what, f"write it again {source}", partial(put, path, data)
                )
        return Fault(number, "folder", what, "nothing else tells what was in it; it stays so")

    def _copies(
        self, number: int, path: Path, make: Callable[[], bytes | None]
    ) -> Iterator[tuple[str, bytes | None]]:
        """Where a file's content can come from, the surest first."""
        yield "as MLflow has it", self._fetch(path.parent, number, path.name)
        yield "from the storage and the other files", make()

    def _config(self, trial: FrozenTrial) -> bytes | None:
        entry = self._read_entry(trial.number)
        asked = entry.overrides if entry is not None else {**self._common, **trial.params}
        try:
            return as_json(self._base.with_overrides(asked).to_dict())
        except ConfigError:  # what was proposed is no valid setting: the base's stands for it
            return as_json(self._base.to_dict())

    def _is_config(self, trial: FrozenTrial, data: bytes) -> bool:
        try:
            digest = TrainConfig.from_dict(json.loads(data)).digest()
        except (ValueError, ConfigError):
            return False
        return trial.user_attrs.get("digest") in (None, digest)

    def _entry(self, trial: FrozenTrial) -> bytes | None:
        """tracking.json out of the storage and the other files; its times are the storage's."""
        files = TrialFolder(trial_folder(self._study_dir, trial.number))
        config = read_json(files.config)
        verdicts = self._right_one(trial, files.verdicts, partial(are_verdicts, trial))
        if config is None or verdicts is None or trial.datetime_start is None:
            return None
        result = self._right_one(trial, files.result, partial(is_result, trial))
        ended = trial.datetime_complete or trial.datetime_start
        beside = self._neighbour
        entry = Entry(
            study=self._study.study_name,
            number=trial.number,
            attempt=trial.user_attrs.get("attempt", 1),
            launch=self._launch_of(files.path),
            recipe=self._recipe,
            overrides=TrainConfig.from_dict(config).difference(self._base),
            workers=beside.workers if beside is not None else 1,
            gpus_per_worker=beside.gpus_per_worker if beside is not None else 0.0,
            started=trial.datetime_start.timestamp(),
            state=trial.state.name,
            ended=ended.timestamp(),
            verdicts=verdicts,
            result=result,
        )
        return as_json(asdict(entry))

    def _launch_of(self, folder: Path) -> int:
        progress = read_json(folder / "mirror.json")
        return int(progress.get("launch") or 1) if isinstance(progress, dict) else 1

    def _right_one(self, trial: FrozenTrial, path: Path, is_right: Callable[[bytes], bool]) -> Any:
        """What a JSON file says, here or as a mirror has it; None = neither is right."""
        here = path.read_bytes() if path.exists() else None
        if here is not None and is_right(here):
            return json.loads(here)
        there = self._fetch(path.parent, trial.number, path.name)
        return json.loads(there) if there is not None and is_right(there) else None

    def _verdicts(self, trial: FrozenTrial) -> bytes | None:
        entry = self._read_entry(trial.number)
        return as_json(entry.verdicts) if entry is not None and entry.has_ended else None

    def _result(self, trial: FrozenTrial) -> bytes | None:
        entry = self._read_entry(trial.number)
        result = entry.read_result() if entry is not None else None
        if result is None:
            result = self._listed_result(trial.number)
        return None if result is None else (result.model_dump_json(indent=2) + "\n").encode()

    def _told(self, trial: FrozenTrial) -> bytes:
        entry = self._read_entry(trial.number)
        ended = entry.ended if entry is not None else None
        if ended is None and trial.datetime_complete is not None:
            ended = trial.datetime_complete.timestamp()
        return as_json({"state": trial.state.name, "time": ended})

    def _curve(self, trial: FrozenTrial) -> bytes | None:
        entry = self._read_entry(trial.number)
        if entry is None:
            return None
        text = curve_of(trial_folder(self._study_dir, trial.number), run_name(entry))
        return None if text is None else text.encode()

    def _is_curve(self, trial: FrozenTrial, data: bytes) -> bool:
        return data == self._curve(trial)

    def _listed_result(self, number: int) -> TrainResult | None:
        row = self._listed().get(number, {})
        return TrainResult.model_validate(row["result"]) if row.get("result") else None

    # --- the list of trials, and what belongs to none ---------------------------------------

    def _list_faults(self) -> Iterator[Fault]:
        for line, row in read_lines(self._study_dir / TRIALS_FILE):
            if row is None:
                what = f"a line that cannot be read: {line[:60]!r}"
                mend = partial(self._take_out, line)
                yield Fault(None, TRIALS_FILE, what, f"move it to {TRIALS_FILE}.broken", mend)
        listed = self._listed()
        trials = {t.number: t for t in frozen_trials(self._study) if t.state.is_finished()}
        for number, trial in trials.items():
            row = listed.get(number)
            if row is not None and is_row(trial, row):
                continue
            entry = self._read_entry(number)
            what = "it has no line" if row is None else "its line is not what the storage has"
            if entry is None or not entry.has_ended:
                yield Fault(
                    number, TRIALS_FILE, what, "its tracking.json must be there first; it stays so"
                )
                continue
            mend = partial(self._relist, trial, entry)
            yield Fault(number, TRIALS_FILE, what, "write the line again", mend)
        for number in sorted(listed.keys() - trials.keys()):
            what = "a line of a trial that the storage does not have as ended"
            yield Fault(number, TRIALS_FILE, what, "take it out", partial(self._unlist, number))

    def _relist(self, trial: FrozenTrial, entry: Entry) -> None:
        """The line as JsonlTracker writes it, in the place that its time gives it."""
        self._unlist(trial.number)
        own = self._study_dir / f"{TRIALS_FILE}.{trial.number}"
        own.unlink(missing_ok=True)
        spec, _ = self._book.specify(trial.number, trial.params)
        spec = replace(spec, overrides=entry.overrides)
        tracker = JsonlTracker(own, clock=lambda: entry.ended or 0.0)
        tracker.trial_ended(spec, entry.state, entry.read_verdicts(), entry.read_result())
        rows = [*self._rows(), *((line, row) for line, row in read_lines(own) if row is not None)]
        own.unlink()
        self._write_lines(line for line, _ in sorted(rows, key=lambda each: each[1]["time"]))

    def _unlist(self, number: int) -> None:
        self._write_lines(line for line, row in self._rows() if row["number"] != number)

    def _take_out(self, broken: str) -> None:
        with (self._study_dir / f"{TRIALS_FILE}.broken").open("a") as file:
            file.write(broken)
        lines = [line for line, _ in read_lines(self._study_dir / TRIALS_FILE)]
        self._write_lines(line for line in lines if line != broken)

    def _write_lines(self, lines: Iterable[str]) -> None:
        put(self._study_dir / TRIALS_FILE, "".join(lines).encode())

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        lines = read_lines(self._study_dir / TRIALS_FILE)
        return [(line, row) for line, row in lines if row is not None]

    def _listed(self) -> dict[int, dict[str, Any]]:
        return {row["number"]: row for _, row in self._rows()}

    def _orphan_faults(self) -> Iterator[Fault]:
        known = {
            trial_folder(self._study_dir, trial.number) for trial in frozen_trials(self._study)
        }
        for folder in sorted(self._study_dir.glob("trial-*")):
            if folder.is_dir() and folder not in known:
                target = self._study_dir / ORPHANS / folder.name
                what = f"{folder.name} is the folder of no trial"
                mend = partial(move, folder, target)
                yield Fault(None, "folder", what, f"move it to {ORPHANS}/", mend)

    # --- what the parts need ----------------------------------------------------------------

    def _read_entry(self, number: int) -> Entry | None:
        folder = trial_folder(self._study_dir, number)
        return entry_or_none(folder)

    def _some_entry(self) -> Entry | None:
        """Any trial's: workers are the same for all of a study as a rule."""
        found = (entry_or_none(folder) for folder in folders_with_entries(self._study_dir))
        return next((entry for entry in found if entry is not None), None)

    def _places(self) -> dict[str, Any]:
        """Where data lies and how trials run, which the storage does not say."""
        overrides = self._neighbour.overrides if self._neighbour is not None else {}
        return {
            path: value
            for path, value in overrides.items()
            if path.startswith(("data.dir", "runtime.")) and path != "runtime.seed"
        }

    def _demand(self, number: int) -> Demand:
        entry = self._read_entry(number) or self._neighbour
        return Demand(entry.workers, entry.gpus_per_worker) if entry is not None else Demand()


class OutboxTracker:
    """Leaves word for the MLflow mirror in the trial's folder, and nothing else."""

    def trial_started(self, spec: TrialSpec) -> None:
        open_entry(spec)

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        pass

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        close_entry(spec, state, verdicts, result)

    def close(self, grace_seconds: float = 10.0) -> None:
        pass
