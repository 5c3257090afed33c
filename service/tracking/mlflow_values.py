"""What MLflow is told of a trial: its run's name, parameters, metrics, description, and columns.

Separate from the mirror, which knows when to send and how to repeat it.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.tracking.outbox import Entry
from service.tracking.outcome import Outcome
from service.tracking.settings_text import describe_by_leaf
from service.trial import TrialFolder
from trainer.config import TrainConfig
from trainer.report import TrainResult

if TYPE_CHECKING:
    from mlflow.entities import Metric

MAX_PARAM_CHARS = 6000
STEP_METRICS = ("train_loss", "elapsed_s", "step_ms", "lr_mult", "tokens_per_s", "progress")
VAL_METRICS = ("val_loss", "val_bpb")
BY_SECOND = ("train_loss", *VAL_METRICS)
"""Curves that are also sent with the second of the budget clock in place of the step."""
NOT_NUMBERS = ("kind", "time", "sample")
"""Fields of a `system` record that are no measurement."""
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
NAME_COLUMN = "attributes.`Run Name`"
COLUMNS = (
    "tags.`verdict`",
    "metrics.`bits_per_byte`",
    "metrics.`nats_per_token`",
    "metrics.`bytes_left`",
    "metrics.`train_seconds_left`",
    "metrics.`eval_seconds_left`",
    "metrics.`tokens_per_s`",
)
"""What trials are compared by, in the order of the UI's table; the seconds held come after."""


def run_name(entry: Entry, max_chars: int = 120) -> str:
    """The trial's number and what makes it differ from the recipe: "7: matrix_lr=0.031"."""
    own = {
        path: value
        for path, value in entry.overrides.items()
        if not path.startswith(("budget.", "data.dir"))  # the same for the whole study
    }
    name = f"{entry.number}: {describe_by_leaf(own) or entry.recipe}"
    return name if len(name) <= max_chars else name[: max_chars - 3] + "..."


def shared_view(entry: Entry) -> str:
    """The view of the table of runs that `caddie ui` opens, as the UI itself keeps one."""
    columns = [*COLUMNS, f"metrics.`{held_name(entry)}`"]
    return json.dumps(
        {
            "selectedColumns": columns,
            "columnOrder": [NAME_COLUMN, *columns],
            "columnWidths": {NAME_COLUMN: 300, "tags.`verdict`": 150, "metrics.`bytes_left`": 90},
            "orderByKey": "metrics.`bits_per_byte`",
            "orderByAsc": True,
            "hideEmptyCharts": True,
        }
    )


def description(entry: Entry, outcome: Outcome, dashboard: str | None) -> str:
    """The fate of a trial and where else it can be looked at, in Markdown.

    Args:
        dashboard: Address of the study's page in optuna-dashboard; None = unknown.
    """
    fate = f"**{outcome.verdict}**" + (f": {outcome.reason}" if outcome.reason else "")
    show = f"`caddie trial show {entry.study} {entry.number}`"
    link = f"[Trial {entry.number} in optuna-dashboard]({trial_page(dashboard, entry.number)})"
    return f"{fate}\n\n{link if dashboard else f'Trial {entry.number}'}; {show}"


def trial_page(dashboard: str | None, number: int) -> str:
    """Address of one trial, from that of its study."""
    return f"{dashboard}/trials?numbers={number}"


def params_of(folder: Path, entry: Entry) -> dict[str, str]:
    """The settings that runs are compared by, and every one that differs from the recipe."""
    config = _config(folder)
    settings: dict[str, Any] = {"recipe": entry.recipe, "workers": entry.workers}
    if config is not None:
        flat = config.flat()
        settings |= {path: flat[path] for path in MAIN_SETTINGS}
    settings |= entry.overrides
    return {_metric_name(name): str(value)[:MAX_PARAM_CHARS] for name, value in settings.items()}


def metrics_of(record: dict[str, Any]) -> list[Metric]:
    """The metrics of one line of metrics.jsonl."""
    from mlflow.entities import Metric

    time_ms = int(record["time"] * 1000)
    if record["kind"] == "system":
        return [
            Metric(f"system/{name}", float(value), time_ms, int(record["sample"]))
            for name, value in record.items()
            if name not in NOT_NUMBERS
        ]
    names = {"step": STEP_METRICS, "val": VAL_METRICS}.get(record["kind"], ())
    values = {name: float(record[name]) for name in names if record.get(name) is not None}
    metrics = [Metric(name, value, time_ms, int(record["step"])) for name, value in values.items()]
    if record.get("elapsed_s") is not None:
        metrics += [
            Metric(f"by_second/{name}", values[name], time_ms, int(record["elapsed_s"]))
            for name in BY_SECOND
            if name in values
        ]
    return metrics


def final_metrics(folder: Path, entry: Entry) -> list[Metric]:
    """Results, what they leave of the budgets, phase seconds and constraints; once per trial."""
    from mlflow.entities import Metric

    assert entry.ended is not None
    values: dict[str, float] = {}
    result = entry.read_result()
    launched = result is not None or TrialFolder(folder).metrics.exists()
    units = entry.workers * (entry.gpus_per_worker or 1)
    values[held_name(entry)] = units * (entry.ended - entry.started) if launched else 0.0
    if result is not None:
        values |= _results(result)
        values |= _left(result, _config(folder))
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


def held_name(entry: Entry) -> str:
    """GPUs, or workers where there is no GPU, times seconds from its start to its end."""
    return "gpu_seconds" if entry.gpus_per_worker else "worker_seconds"


def _results(result: TrainResult) -> dict[str, float]:
    numbers = {
        "bits_per_byte": result.val_bpb,
        "nats_per_token": result.val_loss,
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
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _left(result: TrainResult, config: TrainConfig | None) -> dict[str, float]:
    """Budgets less what was used; negative = over. A budget without a limit leaves nothing to say,
    nor does a run that ended early."""
    if config is None or result.status != "finished":
        return {}
    phases, budget = result.phases, config.budget
    used = {
        "bytes_left": (budget.artifact_bytes, result.bytes_total),
        "train_seconds_left": (
            budget.train_seconds,
            phases.get("train", 0.0) + phases.get("calibrate", 0.0),
        ),
        "eval_seconds_left": (budget.eval_seconds, phases.get("evaluate")),
    }
    return {
        name: float(cap - spent)
        for name, (cap, spent) in used.items()
        if cap is not None and spent is not None
    }


def _config(folder: Path) -> TrainConfig | None:
    file = TrialFolder(folder).config
    return TrainConfig.from_dict(json.loads(file.read_text())) if file.exists() else None


def _metric_name(name: str) -> str:
    """MLflow allows letters, digits and _-./ and blanks."""
    return re.sub(r"[^\w\-./ ]", "_", name)
