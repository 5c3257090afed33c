"""Copies one study's trial folders to an MLflow server, in steps that can be repeated.

Every call may be cut off anywhere and made again, by another process too, without leaving anything
twice: a run is created together with a tag that names it (study id, number, launch) and is looked
up by that tag first; MLflow itself drops a metric it already has; parameters, tags and files are
overwritten with what they were.

One experiment holds every study: a parent run per study, a child run per trial.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import mask_passwords
from service.tracking.curve import write_curve
from service.tracking.outbox import (
    Entry,
    Progress,
    new_records,
    read_progress,
    write_progress,
)
from service.tracking.outcome import outcome_of
from service.tracking.settings_text import describe_by_leaf
from service.trial import TrialFolder
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

EXPERIMENT = "caddie"
KEY_TAG = "caddie.key"
MAX_BATCH = 1000
"""MLflow takes at most this many metrics in one call."""
MAX_PARAMS = 100
MAX_PARAM_CHARS = 6000
RECORDS_PER_BATCH = 100
"""A record holds fewer than ten numbers."""
STEP_METRICS = ("train_loss", "elapsed_s", "step_ms", "lr_mult", "tokens_per_s", "progress")
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "final.val_bpb",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
}
"""Make the UI open on the table of runs, not on its pages for language-model applications."""
VAL_METRICS = ("val_loss", "val_bpb")
MAIN_SETTINGS = (
    "model.vocab_size",
    "model.num_layers",
    "model.model_dim",
    "model.num_heads",
    "model.num_kv_heads",
    "model.mlp_mult",
    "optim.matrix_lr",
    "optim.scalar_lr",
    "optim.tied_embed_lr",
    "optim.weight_decay",
    "schedule.warmdown",
    "data.seq_len",
    "data.batch_tokens",
    "quantize.scheme",
    "compress.codec",
    "budget.train_seconds",
    "budget.artifact_bytes",
    "runtime.seed",
)
"""Logged for every trial, changed or not, so that runs can be compared by them."""
RUN_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


class MlflowMirror:
    """The state of one study on one server.

    Args:
        tracking_uri: Server or database URL.
        study: Name of the parent run.
        study_id: Tells apart studies of one name, such as two people's on one server.
        artifact_root: Where the files of a new experiment go; None = as the server decides.
    """

    def __init__(
        self, tracking_uri: str, study: str, study_id: str, artifact_root: str | None = None
    ) -> None:
        from mlflow.tracking import MlflowClient

        self.target = mask_passwords(tracking_uri)
        self._study = study
        self.study_id = study_id
        self._artifact_root = artifact_root
        self.client: MlflowClient = MlflowClient(tracking_uri)
        self._experiment: str | None = None
        self._parent: str | None = None

    def sync(self, folder: Path, entry: Entry) -> Progress:
        """Send what the server lacks of one trial; raises whatever MLflow raises."""
        progress = read_progress(folder, self.target)
        if progress.launch != entry.launch:
            self._drop_earlier(entry)
            progress = Progress(target=self.target, launch=entry.launch)
        if progress.finished:
            return progress
        run_id = progress.run_id or self._child_run(folder, entry)
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
        self.client.update_run(self.parent_run(), status="RUNNING")

    def close_study(self, pictures: Iterable[Path] = ()) -> None:
        """Mark the study's run as finished, with pictures of the whole study."""
        for picture in pictures:
            self.client.log_artifact(self.parent_run(), str(picture))
        self.client.set_terminated(self.parent_run(), status="FINISHED")

    def _send_metrics(self, folder: Path, progress: Progress, run_id: str) -> Progress:
        while True:
            records, end = new_records(folder, progress.metric_bytes, RECORDS_PER_BATCH)
            if not records:
                return progress
            metrics = [metric for record in records for metric in metrics_of(record)]
            assert len(metrics) <= MAX_BATCH
            if metrics:
                self.client.log_batch(run_id, metrics=metrics)
            progress = replace(progress, metric_bytes=end)
            write_progress(folder, progress)

    def _finish(self, folder: Path, entry: Entry, run_id: str) -> None:
        assert entry.ended is not None
        self._log_tags(run_id, end_tags(folder, entry))
        self.client.log_batch(run_id, metrics=final_metrics(entry))
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
            tags = {KEY_TAG: self.key(entry), **start_tags(entry, self.parent_run())}
            self.client.update_run(run_id, name=run_name(entry))
            self._log_tags(run_id, tags)
            self._log_params(run_id, folder, entry)
        write_progress(folder, Progress(self.target, entry.launch, run_id))
        self.sync(folder, entry)

    def key(self, entry: Entry) -> str:
        """What names the run of an entry's launch, on any server."""
        return f"{self.study_id}/{entry.number}/{entry.launch}"

    def _child_run(self, folder: Path, entry: Entry) -> str:
        key = self.key(entry)
        tags = start_tags(entry, self.parent_run())
        run_id = self._find(key) or self._create(
            key, run_name(entry), tags, int(entry.started * 1000)
        )
        self._log_params(run_id, folder, entry)
        return run_id

    def _log_params(self, run_id: str, folder: Path, entry: Entry) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in params_of(folder, entry).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])

    def parent_run(self) -> str:
        """Id of the study's run, which is made when it is missing."""
        if self._parent is None:
            tags = {"caddie.study": self._study, "mlflow.source.name": "caddie"}
            self._parent = self._find(self.study_id) or self._create(
                self.study_id, self._study, tags, None
            )
        return self._parent

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
        """Of the experiment of all studies, which is made when it is missing."""
        if self._experiment is None:
            from mlflow.exceptions import MlflowException

            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                self._experiment = found.experiment_id
                return self._experiment
            try:
                self._experiment = self.client.create_experiment(
                    EXPERIMENT, self._artifact_root, EXPERIMENT_TAGS
                )
            except MlflowException:  # another sweep was quicker
                found = self.client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
                self._experiment = found.experiment_id
        return self._experiment

    def _log_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(
            run_id, tags=[RunTag(name, value[:5000]) for name, value in tags.items()]
        )


def run_name(entry: Entry, max_chars: int = 120) -> str:
    """The trial's number and what makes it differ from the recipe: "7: matrix_lr=0.031"."""
    own = {
        path: value
        for path, value in entry.overrides.items()
        if not path.startswith(("budget.", "data.dir"))  # the same for the whole study
    }
    name = f"{entry.number}: {describe_by_leaf(own) or entry.recipe}"
    return name if len(name) <= max_chars else name[: max_chars - 3] + "..."


def start_tags(entry: Entry, parent: str) -> dict[str, str]:
    """Tags of a trial's run from its start on; `parent` is the run of its study."""
    return {
        "mlflow.parentRunId": parent,
        "mlflow.source.name": "caddie",
        "caddie.study": entry.study,
        "caddie.trial": str(entry.number),
        "caddie.attempt": str(entry.attempt),
        "caddie.recipe": entry.recipe,
        "verdict": "running",
    }


def end_tags(folder: Path, entry: Entry) -> dict[str, str]:
    """Tags that an ended trial's run has beside those."""
    launched = entry.result is not None or TrialFolder(folder).metrics.exists()
    outcome = outcome_of(entry.state, entry.read_verdicts(), launched)
    return {
        "caddie.state": entry.state,
        "verdict": outcome.verdict,
        "reason": outcome.reason or "every constraint holds",
    }


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


def params_of(folder: Path, entry: Entry) -> dict[str, str]:
    config_file = TrialFolder(folder).config
    settings: dict[str, Any] = {"recipe": entry.recipe, "workers": entry.workers}
    if config_file.exists():
        flat = TrainConfig.from_dict(json.loads(config_file.read_text())).flat()
        settings |= {path: flat[path] for path in MAIN_SETTINGS}
    settings |= entry.overrides
    return {_metric_name(name): str(value)[:MAX_PARAM_CHARS] for name, value in settings.items()}


def metrics_of(record: dict[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    names = {"step": STEP_METRICS, "val": VAL_METRICS}.get(record["kind"], ())
    time_ms = int(record["time"] * 1000)
    return [
        Metric(name, float(record[name]), time_ms, int(record["step"]))
        for name in names
        if record.get(name) is not None
    ]


def final_metrics(entry: Entry) -> list[Metric]:
    """Results, phase seconds, bytes and constraints; at step 0, once per trial."""
    from mlflow.entities import Metric

    assert entry.ended is not None
    values: dict[str, float] = {}
    result = entry.read_result()
    if result is not None:
        numbers = {
            "final.val_bpb": result.val_bpb,
            "final.val_loss": result.val_loss,
            "final.val_bpb_prequant": result.val_bpb_prequant,
            "bytes_total": result.bytes_total,
            "bytes_code": result.bytes_code,
            "bytes_model": result.bytes_model,
            "steps": result.steps,
            "tokens": result.tokens,
            "num_params": result.num_params,
            "peak_memory_bytes": result.peak_memory_bytes,
        }
        values |= {name: float(value) for name, value in numbers.items() if value is not None}
        values |= {f"seconds.{name}": seconds for name, seconds in result.phases.items()}
    for verdict in entry.read_verdicts():
        values[f"constraint.{verdict.name}"] = verdict.excess
        values[f"constraint.{verdict.name}.value"] = verdict.value
        values[f"constraint.{verdict.name}.bound"] = verdict.bound
    time_ms = int(entry.ended * 1000)
    return [
        Metric(_metric_name(name), value, time_ms, 0)
        for name, value in values.items()
        if not math.isnan(value)
    ]


def _metric_name(name: str) -> str:
    """MLflow allows letters, digits and _-./ and blanks."""
    return re.sub(r"[^\w\-./ ]", "_", name)
