"""Copies one study's trial folders to an MLflow server, in steps that can be repeated.

Every call may be cut off anywhere and made again, by another process too, without leaving anything
twice: a run is created together with a tag that names it (study id, number, launch) and is looked
up by that tag first; MLflow itself drops a metric it already has; parameters, tags and files are
overwritten with what they were.

An experiment holds one study: a run per trial, and one for the pictures of the whole. Parent and
child runs would not do: the table and the charts of the UI open with children folded away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from service.config import mask_passwords
from service.tracking.curve import write_curve
from service.tracking.mlflow_values import (
    description,
    final_metrics,
    metrics_of,
    params_of,
    run_name,
    shared_view,
)
from service.tracking.outbox import (
    Entry,
    Progress,
    new_records,
    read_progress,
    write_progress,
)
from service.tracking.outcome import Outcome, outcome_of
from service.trial import TrialFolder

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT_PREFIX = "caddie/"
KEY_TAG = "caddie.key"
MAX_BATCH = 1000
"""MLflow takes at most this many metrics in one call."""
MAX_PARAMS = 100
RECORDS_PER_BATCH = 100
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "bits_per_byte",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
}
"""Make the UI open on the table of runs, not on its pages for language-model applications."""
STUDY_TAG = "caddie.study_id"
NOTE_TAG = "mlflow.note.content"
"""What the UI shows as a description, in Markdown."""
VIEW = "caddie"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Where the UI keeps a view that was shared; an address with viewStateShareKey=VIEW opens it."""
RUN_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


class MlflowMirror:
    """The state of one study on one server.

    Args:
        tracking_uri: Server or database URL.
        study: Name of the study; its experiment is caddie/STUDY.
        study_id: Tells apart studies of one name, such as two people's on one server.
        artifact_root: Where the files of a new experiment go; None = as the server decides.
        dashboard: Address of the study's page in optuna-dashboard, for links; None = no links.
    """

    def __init__(
        self,
        tracking_uri: str,
        study: str,
        study_id: str,
        artifact_root: str | None = None,
        dashboard: str | None = None,
    ) -> None:
        from mlflow.tracking import MlflowClient

        self.target = mask_passwords(tracking_uri)
        self._study = study
        self.study_id = study_id
        self._artifact_root = artifact_root
        self._dashboard = dashboard
        self.client: MlflowClient = MlflowClient(tracking_uri)
        self._experiment: str | None = None
        self._whole: str | None = None
        self._has_view = False

    def sync(self, folder: Path, entry: Entry) -> Progress:
        """Send what the server lacks of one trial; raises whatever MLflow raises."""
        progress = read_progress(folder, self.target)
        if progress.launch != entry.launch:
            self._drop_earlier(entry)
            progress = Progress(target=self.target, launch=entry.launch)
        if progress.finished:
            return progress
        run_id = progress.run_id or self._trial_run(folder, entry)
        if progress.run_id is None:
            progress = replace(progress, run_id=run_id)
            write_progress(folder, progress)
        progress = self._send_metrics(folder, progress, run_id)
        if entry.has_ended:
            self._finish(folder, entry, run_id)
            progress = replace(progress, finished=True)
            write_progress(folder, progress)
        return progress

    def open_study(self) -> None:
        """Mark the study's run as running, creating it when needed."""
        self.client.update_run(self._study_run(), status="RUNNING")

    def close_study(self, pictures: Iterable[Path] = ()) -> None:
        """Mark the study's run as finished, with pictures of the whole study."""
        for picture in pictures:
            self.client.log_artifact(self._study_run(), str(picture))
        self.client.set_terminated(self._study_run(), status="FINISHED")

    def _send_metrics(self, folder: Path, progress: Progress, run_id: str) -> Progress:
        while True:
            records, end = new_records(folder, progress.metric_bytes, RECORDS_PER_BATCH)
            if not records:
                return progress
            metrics = [metric for record in records for metric in metrics_of(record)]
            for start in range(0, len(metrics), MAX_BATCH):
                self.client.log_batch(run_id, metrics=metrics[start : start + MAX_BATCH])
            progress = replace(progress, metric_bytes=end)
            write_progress(folder, progress)

    def _finish(self, folder: Path, entry: Entry, run_id: str) -> None:
        assert entry.ended is not None
        note = description(entry, outcome_of_entry(folder, entry), self._dashboard)
        self._log_tags(run_id, {**end_tags(folder, entry), NOTE_TAG: note})
        self.client.log_batch(run_id, metrics=final_metrics(folder, entry))
        write_curve(folder, run_name(entry))
        for file in mirrored_files(folder):
            if file.exists():
                self.client.log_artifact(run_id, str(file))
        self.client.set_terminated(
            run_id, status=RUN_STATUS.get(entry.state, "FAILED"), end_time=int(entry.ended * 1000)
        )

    def resend(self, folder: Path, entry: Entry, run_id: str | None) -> None:
        """Send all of an ended trial again: into a run that has it already, which adds what is
        missing and puts tags and files right; or, without one, into a new run."""
        if run_id is not None:
            self.client.update_run(run_id, name=run_name(entry))
            self._log_tags(run_id, {KEY_TAG: self.key(entry), **start_tags(entry)})
            self._log_params(run_id, folder, entry)
        write_progress(folder, Progress(self.target, entry.launch, run_id))
        self.sync(folder, entry)

    def key(self, entry: Entry) -> str:
        """What names the run of an entry's launch, on any server."""
        return f"{self.study_id}/{entry.number}/{entry.launch}"

    def _trial_run(self, folder: Path, entry: Entry) -> str:
        key = self.key(entry)
        run_id = self._find(key) or self._create(
            key, run_name(entry), start_tags(entry), int(entry.started * 1000)
        )
        self._show_columns(entry)
        self._log_params(run_id, folder, entry)
        return run_id

    def _log_params(self, run_id: str, folder: Path, entry: Entry) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in params_of(folder, entry).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])

    def _study_run(self) -> str:
        """The run that holds the pictures of the whole study."""
        if self._whole is None:
            tags = {
                "caddie.study": self._study,
                "mlflow.source.name": "caddie",
                "verdict": "the study",
                NOTE_TAG: self._study_note(),
            }
            self._whole = self._find(self.study_id) or self._create(
                self.study_id, f"{self._study}: pictures", tags, None
            )
        return self._whole

    def _study_note(self) -> str:
        page = f" [In optuna-dashboard]({self._dashboard})." if self._dashboard else ""
        return f"Pictures of the study {self._study}: see the artifacts.{page}"

    def _drop_earlier(self, entry: Entry) -> None:
        """Delete the runs of launches whose files are gone."""
        for launch in range(1, entry.launch):
            run_id = self._find(self.key(replace(entry, launch=launch)))
            if run_id is not None:
                self.client.delete_run(run_id)

    def _find(self, key: str) -> str | None:
        runs = self.client.search_runs(
            [self.experiment_id()], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        return str(runs[0].info.run_id) if runs else None

    def _create(self, key: str, name: str, tags: dict[str, str], start_time: int | None) -> str:
        run = self.client.create_run(
            self.experiment_id(),
            start_time=start_time,
            tags={KEY_TAG: key, **tags},
            run_name=name,
        )
        return str(run.info.run_id)

    def experiment_id(self) -> str:
        """Of this study; looked for, or made, at the first call."""
        if self._experiment is None:
            self._experiment = self.found_experiment() or self._created_experiment()
        return self._experiment

    def found_experiment(self) -> str | None:
        """This study's experiment: another study's of the same name is left alone."""
        for name in experiment_names(self._study, self.study_id):
            found = self.client.get_experiment_by_name(name)
            if found is not None and found.tags.get(STUDY_TAG) == self.study_id:
                return str(found.experiment_id)
        return None

    def _created_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        tags = {**EXPERIMENT_TAGS, STUDY_TAG: self.study_id}
        _, plain = names = experiment_names(self._study, self.study_id)
        name = names[0] if self.client.get_experiment_by_name(plain) is not None else plain
        try:
            return str(self.client.create_experiment(name, self._artifact_root, tags))
        except MlflowException:  # another process of this study was quicker
            found = self.found_experiment()
            if found is None:
                raise
            return found

    def _show_columns(self, entry: Entry) -> None:
        """Let the UI open with the columns that trials are compared by."""
        if not self._has_view:
            self.client.set_experiment_tag(self.experiment_id(), VIEW_TAG, shared_view(entry))
            self._has_view = True

    def _log_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(
            run_id, tags=[RunTag(name, value[:5000]) for name, value in tags.items()]
        )


def experiment_names(study: str, study_id: str) -> tuple[str, str]:
    """What a study's experiment may be called: beside one of the same name, and usually."""
    usual = EXPERIMENT_PREFIX + study
    return f"{usual} ({study_id[:8]})", usual


def start_tags(entry: Entry) -> dict[str, str]:
    """Tags of a trial's run from its start on."""
    return {
        "mlflow.source.name": "caddie",
        "caddie.study": entry.study,
        "caddie.trial": str(entry.number),
        "caddie.attempt": str(entry.attempt),
        "caddie.recipe": entry.recipe,
        "verdict": "running",
    }


def end_tags(folder: Path, entry: Entry) -> dict[str, str]:
    """Tags that an ended trial's run has beside those and its description."""
    outcome = outcome_of_entry(folder, entry)
    return {
        "caddie.state": entry.state,
        "verdict": outcome.verdict,
        "reason": outcome.reason or "every constraint holds",
    }


def outcome_of_entry(folder: Path, entry: Entry) -> Outcome:
    """What became of an ended trial, in words."""
    launched = entry.result is not None or TrialFolder(folder).metrics.exists()
    return outcome_of(entry.state, entry.read_verdicts(), launched)


def mirrored_files(folder: Path) -> list[Path]:
    """Files of a trial that its run keeps copies of, where they exist."""
    files = TrialFolder(folder)
    return [
        files.config,
        files.provenance,
        files.metrics,
        files.log,
        files.verdicts,
        files.result,
        files.artifact,
        folder / "curve.svg",
    ]
