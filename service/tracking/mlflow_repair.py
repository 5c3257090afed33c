"""What an MLflow store has of a study that it should not have, lacks, or has otherwise.

The trial folders are the truth, so mending is sending again: into the same run where that is
enough, into a new one where MLflow cannot take back what is wrong (a parameter, a metric's point).
What people add to a run by hand, tags, parameters, notes and files of their own, is left alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.fault import Fault
from service.tracking.mlflow_mirror import (
    KEY_TAG,
    RUN_STATUS,
    MlflowMirror,
    end_tags,
    mirrored_files,
    start_tags,
)
from service.tracking.mlflow_values import final_metrics, metrics_of, params_of, run_name
from service.tracking.outbox import Entry, new_records, read_entry, read_progress

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

WHERE = "mlflow"
PAGE = 1000
MAX_RECORDS = 10_000_000
Point = tuple[str, str, int, int]
"""Metric, value as text (NaN equals itself then), milliseconds, step."""


@dataclass(frozen=True)
class Wrong:
    """How a run differs from its folder."""

    lacks: list[str]
    """Sending again mends these."""
    has_otherwise: list[str]
    """These need a new run."""

    @property
    def words(self) -> str:
        return "; ".join([*self.has_otherwise, *self.lacks])


class MlflowRepair:
    """Compares one study's runs with its folders.

    Args:
        mirror: Of the study.
        quick: Compare sizes of files and last values of metrics, not every byte and point.
    """

    def __init__(self, mirror: MlflowMirror, quick: bool = False) -> None:
        self._mirror = mirror
        self._client = mirror.client
        self._quick = quick
        self._runs: list[Run] | None = None

    def connect(self) -> None:
        """Raises whatever MLflow raises when it cannot be used."""
        self._known_runs()

    def faults(self, folders: Sequence[Path]) -> Iterator[Fault]:
        """Everything wrong with the runs of these trial folders, and runs beside them.

        Args:
            folders: Of all trials of the study that a tracker has seen.
        """
        entries = {folder: entry for folder in folders if (entry := read_entry(folder))}
        yield from self._parent_faults()
        expected = {self._mirror.key(entry) for entry in entries.values()}
        expected.add(self._mirror.study_id)
        yield from self._extra_faults(expected)
        for folder, entry in entries.items():
            if entry.has_ended:
                yield from self._trial_faults(folder, entry)

    def copy_of(self, folder: Path, number: int, name: str) -> bytes | None:
        """A trial's file as its latest run has it; None = it has none."""
        prefix = f"{self._mirror.study_id}/{number}/"
        runs = [run for run in self._known_runs() if _key(run).startswith(prefix)]
        for run in sorted(runs, key=_launch, reverse=True):
            if name in {file.path for file in self._client.list_artifacts(run.info.run_id)}:
                with tempfile.TemporaryDirectory(prefix="caddie-repair-") as target:
                    return self._download(run.info.run_id, name, target)
        return None

    def _parent_faults(self) -> Iterator[Fault]:
        parents = self._active(self._mirror.study_id)
        if not parents:
            deleted = [run for run in self._known_runs() if _key(run) == self._mirror.study_id]
            mend = partial(self._make_parent, [run.info.run_id for run in deleted])
            yield Fault(None, WHERE, "the study has no run", "make it again", mend)
        elif parents[0].info.status != "FINISHED":
            what = f"the study's run is {parents[0].info.status}, and nobody works on the study"
            yield Fault(None, WHERE, what, "mark it as finished", self._mirror.close_study)

    def _make_parent(self, deleted: list[str]) -> None:
        if deleted:
            self._client.restore_run(deleted[0])
        self._mirror.close_study()
        self._runs = None

    def _extra_faults(self, expected: set[str]) -> Iterator[Fault]:
        seen: set[str] = set()
        for run in self._known_runs():
            key = _key(run)
            if run.info.lifecycle_stage != "active":
                continue
            if key in expected and key not in seen:
                seen.add(key)
                continue
            why = "a second one of the same trial" if key in seen else "of no trial of the study"
            what = f"run {run.info.run_name!r} ({run.info.run_id}) is {why}"
            mend = partial(self._client.delete_run, run.info.run_id)
            yield Fault(_number(key), WHERE, what, "delete the run (MLflow can restore it)", mend)

    def _trial_faults(self, folder: Path, entry: Entry) -> Iterator[Fault]:
        key, number = self._mirror.key(entry), entry.number
        found = self._active(key)
        if not found:
            deleted = [run for run in self._known_runs() if _key(run) == key]
            if deleted:
                run_id = deleted[0].info.run_id
                mend = partial(self._restore, folder, entry, run_id)
                yield Fault(number, WHERE, "its run was deleted", "restore the run", mend)
            else:
                mend = partial(self._mirror.resend, folder, entry, None)
                yield Fault(number, WHERE, "it has no run", "send the trial again", mend)
            return
        run_id = found[0].info.run_id
        try:
            wrong = self._compare(folder, entry, self._client.get_run(run_id))
        except (ValueError, KeyError) as error:  # a broken file of the folder
            what = f"it cannot be compared: {' '.join(str(error).split())[:100]}"
            yield Fault(number, WHERE, what, "mend its folder first")
            return
        if wrong.has_otherwise:
            mend = partial(self._replace, folder, entry, run_id)
            yield Fault(number, WHERE, wrong.words, "replace the run by a new one", mend)
        elif wrong.lacks:
            mend = partial(self._mirror.resend, folder, entry, run_id)
            yield Fault(number, WHERE, wrong.words, "send the trial again", mend)

    def _compare(self, folder: Path, entry: Entry, run: Run) -> Wrong:
        lacks: list[str] = []
        otherwise: list[str] = []
        tags = {KEY_TAG: self._mirror.key(entry), **start_tags(entry)}
        tags |= end_tags(folder, entry)
        params = params_of(folder, entry)
        for kind, wanted, has in (
            ("tag", {name: value[:5000] for name, value in tags.items()}, run.data.tags),
            ("parameter", params, run.data.params),
        ):
            missing, changed = _unlike(wanted, has)
            lacks += [f"{kind} {name} is missing" for name in missing]
            found = [f"{kind} {name} is {has[name]!r}, not {wanted[name]!r}" for name in changed]
            (otherwise if kind == "parameter" else lacks).extend(found)
        status = RUN_STATUS.get(entry.state, "FAILED")
        if run.info.status != status:
            lacks.append(f"its run is {run.info.status}, not {status}")
        if run.info.run_name != run_name(entry):
            lacks.append(f"its run is called {run.info.run_name!r}, not {run_name(entry)!r}")
        missing_points, extra_points = self._points(folder, entry, run)
        lacks += _counted(missing_points, "missing")
        otherwise += _counted(extra_points, "that the folder has not")
        lacks += self._file_faults(folder, entry, run.info.run_id)
        progress = read_progress(folder, self._mirror.target)
        if not (progress.finished and progress.run_id == run.info.run_id):
            lacks.append("mirror.json does not say that all of it was sent to this run")
        return Wrong(lacks, otherwise)

    def _points(self, folder: Path, entry: Entry, run: Run) -> tuple[set[Point], set[Point]]:
        """Points of metrics that the run lacks, and those that it has too many."""
        records, _ = new_records(folder, 0, MAX_RECORDS)
        metrics = [metric for record in records for metric in metrics_of(record)]
        metrics += final_metrics(folder, entry)
        if self._quick:
            last = {metric.key: metric for metric in metrics}
            has = run.data.metrics
            missing = {
                _point(metric)
                for metric in last.values()
                if metric.key not in has or _text(has[metric.key]) != _text(metric.value)
            }
            return missing, set()
        wanted = {_point(metric) for metric in metrics}
        names = {point[0] for point in wanted}
        has_points = {
            _point(metric)
            for name in names & run.data.metrics.keys()
            for metric in self._client.get_metric_history(run.info.run_id, name)
        }
        return wanted - has_points, has_points - wanted

    def _file_faults(self, folder: Path, entry: Entry, run_id: str) -> list[str]:
        sizes = {file.path: file.file_size for file in self._client.list_artifacts(run_id)}
        faults = []
        for file in mirrored_files(folder):
            if not file.exists():
                continue
            if file.name not in sizes:
                faults.append(f"{file.name} is missing")
            elif sizes[file.name] not in (None, file.stat().st_size):
                faults.append(f"{file.name} has {sizes[file.name]} bytes, not {_size(file)}")
            elif not self._quick and self._differs(run_id, file):
                faults.append(f"{file.name} has other bytes")
        return faults

    def _differs(self, run_id: str, file: Path) -> bool:
        with tempfile.TemporaryDirectory(prefix="caddie-repair-") as target:
            return self._download(run_id, file.name, target) != file.read_bytes()

    def _download(self, run_id: str, name: str, target: str) -> bytes:
        return Path(self._client.download_artifacts(run_id, name, target)).read_bytes()

    def _restore(self, folder: Path, entry: Entry, run_id: str) -> None:
        self._client.restore_run(run_id)
        self._runs = None
        wrong = self._compare(folder, entry, self._client.get_run(run_id))
        if wrong.has_otherwise:
            self._replace(folder, entry, run_id)
        else:
            self._mirror.resend(folder, entry, run_id)

    def _replace(self, folder: Path, entry: Entry, run_id: str) -> None:
        self._client.delete_run(run_id)
        self._mirror.resend(folder, entry, None)
        self._runs = None

    def _active(self, key: str) -> list[Run]:
        return [
            run
            for run in self._known_runs()
            if _key(run) == key and run.info.lifecycle_stage == "active"
        ]

    def _known_runs(self) -> list[Run]:
        """Every run of the study, deleted ones included, oldest first."""
        if self._runs is None:
            from mlflow.entities import ViewType

            experiment = self._mirror.found_experiment()
            if experiment is None:
                return []
            found: list[Run] = []
            token: str | None = ""
            while token is not None:
                page = self._client.search_runs(
                    [experiment],
                    filter_string=f"tags.`{KEY_TAG}` LIKE '{self._mirror.study_id}%'",
                    run_view_type=ViewType.ALL,
                    max_results=PAGE,
                    page_token=token or None,
                )
                found += page
                token = page.token or None
            self._runs = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        return self._runs


def _key(run: Run) -> str:
    return str(run.data.tags.get(KEY_TAG, ""))


def _launch(run: Run) -> int:
    last = _key(run).rsplit("/", 1)[-1]
    return int(last) if last.isdigit() else 0


def _number(key: str) -> int | None:
    parts = key.split("/")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None


def _point(metric: Metric) -> Point:
    return metric.key, _text(metric.value), int(metric.timestamp), int(metric.step)


def _text(value: float) -> str:
    return repr(float(value) + 0.0)  # some databases lose the sign of -0.0


def _unlike(wanted: Mapping[str, str], has: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names that are missing, and those with another value."""
    missing = [name for name in wanted if name not in has]
    return missing, [name for name in wanted if name in has and has[name] != wanted[name]]


def _counted(points: set[Point], words: str) -> list[str]:
    names: dict[str, int] = {}
    for name, *_ in sorted(points):
        names[name] = names.get(name, 0) + 1
    return [f"metric {name}: {count} points {words}" for name, count in names.items()]


def _size(file: Path) -> int:
    return file.stat().st_size


def find_study_id(client: MlflowClient, study_dir: Path) -> str | None:
    """The lost name of a study on a server, from any run that one of its trials was sent to."""
    for path in sorted(study_dir.glob("trial-*/mirror.json")):
        try:
            run = client.get_run(json.loads(path.read_text())["run_id"])
        except Exception:  # broken, or the run is gone: another trial may tell
            continue
        key = _key(run)
        if key:
            return key.split("/")[0]
    return None
