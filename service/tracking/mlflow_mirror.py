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
        self._study_id = study_id
        self._artifact_root = artifact_root
        self._client: MlflowClient = MlflowClient(tracking_uri)
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
        self._client.update_run(self._parent_run(), status="RUNNING")

    def close_study(self, pictures: Iterable[Path] = ()) -> None:
        """Mark the study's run as finished, with pictures of the whole study."""
        for picture in pictures:
            self._client.log_artifact(self._parent_run(), str(picture))
        self._client.set_terminated(self._parent_run(), status="FINISHED")

    def _send_metrics(self, folder: Path, progress: Progress, run_id: str) -> Progress:
        while True:
            records, end = new_records(folder, progress.metric_bytes, RECORDS_PER_BATCH)
            if not records:
                return progress
            metrics = [metric for record in records for metric in _metrics_of(record)]
            assert len(metrics) <= MAX_BATCH
            if metrics:
                self._client.log_batch(run_id, metrics=metrics)
            progress = replace(progress, metric_bytes=end)
            write_progress(folder, progress)

    def _finish(self, folder: Path, entry: Entry, run_id: str) -> None:
        assert entry.ended is not None
        files = TrialFolder(folder)
        outcome = outcome_of(entry.state, entry.read_verdicts(), _launched(files, entry))
        self._log_tags(
            run_id,
            {
                "caddie.state": entry.state,
                "verdict": outcome.verdict,
                "reason": outcome.reason or "every constraint holds",
            },
        )
        self._client.log_batch(run_id, metrics=_final_metrics(entry))
        curve = write_curve(folder, run_name(entry))
        names = (
            files.config,
            files.provenance,
            files.metrics,
            files.log,
            files.verdicts,
            files.result,
            files.artifact,
            *([curve] if curve is not None else []),
        )
        for file in names:
            if file.exists():
                self._client.log_artifact(run_id, str(file))
        self._client.set_terminated(
            run_id, status=RUN_STATUS.get(entry.state, "FAILED"), end_time=int(entry.ended * 1000)
        )

    def _child_run(self, folder: Path, entry: Entry) -> str:
        from mlflow.entities import Param

        key = self._key(entry, entry.launch)
        tags = {
            "mlflow.parentRunId": self._parent_run(),
            "mlflow.source.name": "caddie",
            "caddie.study": entry.study,
            "caddie.trial": str(entry.number),
            "caddie.attempt": str(entry.attempt),
            "caddie.recipe": entry.recipe,
            "verdict": "running",
        }
        run_id = self._find(key) or self._create(
            key, run_name(entry), tags, int(entry.started * 1000)
        )
        params = [Param(name, value) for name, value in _params(folder, entry).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        return run_id

    def _parent_run(self) -> str:
        if self._parent is None:
            tags = {"caddie.study": self._study, "mlflow.source.name": "caddie"}
            self._parent = self._find(self._study_id) or self._create(
                self._study_id, self._study, tags, None
            )
        return self._parent

    def _drop_earlier(self, entry: Entry) -> None:
        """Delete the runs of launches whose files are gone."""
        for launch in range(1, entry.launch):
            run_id = self._find(self._key(entry, launch))
            if run_id is not None:
                self._client.delete_run(run_id)

    def _key(self, entry: Entry, launch: int) -> str:
        return f"{self._study_id}/{entry.number}/{launch}"

    def _find(self, key: str) -> str | None:
        runs = self._client.search_runs(
            [self._experiment_id()], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        return str(runs[0].info.run_id) if runs else None

    def _create(self, key: str, name: str, tags: dict[str, str], start_time: int | None) -> str:
        run = self._client.create_run(
            self._experiment_id(),
            start_time=start_time,
            tags={KEY_TAG: key, **tags},
            run_name=name,
        )
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        if self._experiment is None:
            from mlflow.exceptions import MlflowException

            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                self._experiment = found.experiment_id
                return self._experiment
            try:
                self._experiment = self._client.create_experiment(
                    EXPERIMENT, self._artifact_root, EXPERIMENT_TAGS
                )
            except MlflowException:  # another sweep was quicker
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
                self._experiment = found.experiment_id
        return self._experiment

    def _log_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(
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


def _params(folder: Path, entry: Entry) -> dict[str, str]:
    config_file = TrialFolder(folder).config
    settings: dict[str, Any] = {"recipe": entry.recipe, "workers": entry.workers}
    if config_file.exists():
        flat = TrainConfig.from_dict(json.loads(config_file.read_text())).flat()
        settings |= {path: flat[path] for path in MAIN_SETTINGS}
    settings |= entry.overrides
    return {_metric_name(name): str(value)[:MAX_PARAM_CHARS] for name, value in settings.items()}


def _metrics_of(record: dict[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    names = {"step": STEP_METRICS, "val": VAL_METRICS}.get(record["kind"], ())
    time_ms = int(record["time"] * 1000)
    return [
        Metric(name, float(record[name]), time_ms, int(record["step"]))
        for name in names
        if record.get(name) is not None
    ]


def _final_metrics(entry: Entry) -> list[Metric]:
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


def _launched(files: TrialFolder, entry: Entry) -> bool:
    return entry.result is not None or files.metrics.exists()
