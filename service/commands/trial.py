"""`caddie trial show|explain|rerun`: everything known of one trial, why it is so, and once more."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from service.commands.looking import OutOption, StorageOption, StudyArgument
from service.commands.study_files import study_dir
from service.commands.terminal import (
    JsonFlag,
    make_table,
    number,
    output,
    print_json,
    warn,
)
from service.config import ServiceSettings, load_settings
from service.errors import UsageError
from service.tracking.settings_text import short
from service.trial import TrialFolder
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from service.reports.study_view import TrialView

RESULT_PACKAGES = ("brotli", "numpy", "torch", "triton", "zstandard")
"""Whose versions move a loss or an artifact."""
NumberArgument = Annotated[int, typer.Argument(metavar="N", min=0, help="Trial number.")]


def show(
    study: StudyArgument,
    trial: NumberArgument,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show everything known of a trial."""
    view = _view(study, trial, load_settings({"storage": storage, "out": out}))
    document = describe(view)
    if as_json:
        return print_json(document)
    _show(view, document)


def rerun(
    study: StudyArgument,
    trial: NumberArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder of the new run's files.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The data set, if it has moved.")
    ] = None,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a trial's configuration again, outside the study: same settings, seed and workers."""
    from service.commands.train import run

    view = _view(study, trial, load_settings({"storage": storage, "out": out}))
    files = TrialFolder(view.folder)
    if not files.config.exists():
        raise UsageError(f"{files.config}: no such file; the trial was run on another machine")
    config = TrainConfig.from_dict(json.loads(files.config.read_text()))
    if data is not None:
        config = config.with_overrides({"data.dir": str(data.resolve())})
    for difference in changes_since(files, config):
        warn(difference)
    folder = to or view.folder / f"rerun-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "result.json").exists():
        raise UsageError(f"{folder} already holds a run; give another --to")
    result = run(config, folder.resolve(), view.workers)
    before = view.result
    if as_json:
        print_json(
            {
                "number": view.number,
                "result": result.model_dump(mode="json"),
                "before": before.model_dump(mode="json") if before is not None else None,
                "folder": str(folder),
            }
        )
    else:
        table = make_table("", "before", "now", right=("before", "now"))
        for label, field, digits in (
            ("bits per byte", "val_bpb", 6),
            ("steps", "steps", 0),
            ("bytes", "bytes_total", 0),
            ("ms per step", "step_ms", 1),
        ):
            old = getattr(before, field) if before is not None else None
            table.add_row(label, number(old, digits), number(getattr(result, field), digits))
        output().print(table)
        if config.schedule.progress == "clock":
            output().print("schedules follow the clock: equal up to the steps that fit into it")
        output().print(f"files: {folder}")
    if result.status == "stopped":
        raise typer.Exit(1)


def explain(
    study: StudyArgument,
    trial: NumberArgument,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say where a trial's parameters come from, and ask the sampler for them again.

    Exits with 1 when asking again gives others.
    """
    from service.study import load_study
    from service.suggestion import suggest_again

    settings = load_settings({"storage": storage, "out": out})
    found = suggest_again(load_study(study, settings.storage_url), trial)
    for difference in versions_since(trial_files(settings, study, trial), ("optuna", "numpy")):
        warn(difference)
    if as_json:
        print_json({**asdict(found), "same": found.same})
    else:
        table = make_table("", "stored", "asked again")
        for path, value in found.params.items():
            again = "" if found.again is None else str(found.again.get(path, "-"))
            table.add_row(path, str(value), again)
        output().print(f"trial {trial}: {found.origin}", table)
        if found.again is not None:
            output().print(
                f"from {found.known} trials that had ended and {found.running} that ran, seed "
                f"{found.seed}: " + ("the same" if found.same else "not the same")
            )
    if found.same is False:
        raise typer.Exit(1)


def describe(view: TrialView) -> dict[str, Any]:
    """The contract's document of a trial."""
    result = view.result
    files = {path.name: str(path) for path in sorted(view.folder.glob("*")) if path.is_file()}
    return {
        "number": view.number,
        "state": view.state,
        "verdict": view.outcome.verdict,
        "reason": view.outcome.reason,
        "value": view.value,
        "params": view.params,
        "overrides": view.overrides,
        "seed": view.seed,
        "constraints": {
            verdict.name: {
                "value": verdict.value,
                "bound": verdict.bound,
                "unit": verdict.unit,
                "ok": verdict.ok,
                "predicted": verdict.predicted,
                "reason": verdict.reason,
            }
            for verdict in view.verdicts
        },
        "phases": dict(result.phases) if result is not None else {},
        "duplicate_of": view.duplicate_of,
        "error": view.error,
        "started": view.started,
        "ended": view.ended,
        "workers": view.workers,
        "result": result.model_dump(mode="json") if result is not None else None,
        "paths": {"folder": str(view.folder), **files},
    }


def _view(study: str, trial: int, settings: ServiceSettings) -> TrialView:
    from service.reports.study_view import view_trials
    from service.study import load_study

    views = view_trials(load_study(study, settings.storage_url), study_dir(settings, study))
    if trial >= len(views):
        known = f"0 to {len(views) - 1}" if views else "none yet"
        raise UsageError(f"study {study!r} has no trial {trial}; its trials are {known}")
    return views[trial]


def _show(view: TrialView, document: dict[str, Any]) -> None:
    table = make_table("", "")
    reason = f": {view.outcome.reason}" if view.outcome.reason else ""
    table.add_row("trial", f"{view.number}, {view.state}, {view.outcome.verdict}{reason}")
    for path, value in view.overrides.items():
        table.add_row(path, short(value) + (" (sampled)" if path in view.params else ""))
    if view.seed is not None:
        table.add_row("seed", str(view.seed))
    if view.result is not None:
        result = view.result
        table.add_row("bits per byte", number(result.val_bpb))
        table.add_row("before quantisation", number(result.val_bpb_prequant))
        table.add_row("bytes", number(result.bytes_total, 0))
        table.add_row("steps", f"{result.steps:,} of {number(result.step_ms, 1)} ms")
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases.items())
        table.add_row("seconds", phases)
    output().print(table)
    if view.verdicts:
        verdicts = make_table("constraint", "value", "bound", "unit", "ok", "", "reason")
        for verdict in view.verdicts:
            verdicts.add_row(
                verdict.name,
                f"{verdict.value:,.6g}",
                f"{verdict.bound:,.6g}",
                verdict.unit,
                "yes" if verdict.ok else "no",
                "predicted" if verdict.predicted else "measured",
                verdict.reason,
            )
        output().print(verdicts)
    if view.error:
        output().print(Text(view.error))
    output().print(f"files: {document['paths']['folder']}")


def changes_since(files: TrialFolder, config: TrainConfig) -> list[str]:
    """What is not as it was when the trial ran, in sentences."""
    if not files.provenance.exists():
        return ["the trial's provenance.json is missing: nothing says which code and data it used"]
    from service.provenance import describe_code
    from trainer.data.dataset import Dataset

    then = json.loads(files.provenance.read_text())
    changes = versions_since(files)
    digest = Dataset.open(config.data.dir).digest
    if then.get("data_digest") not in (None, digest):
        changes.append(f"the data set is another: digest {digest}, was {then['data_digest']}")
    if then.get("code") not in (None, describe_code(Path(__file__).parent)):
        changes.append("the code has changed since: see provenance.json")
    return changes


def versions_since(files: TrialFolder, packages: Sequence[str] = RESULT_PACKAGES) -> list[str]:
    """Which packages have another version than when the trial ran, in sentences."""
    if not files.provenance.exists():
        return []
    from service.provenance import package_versions

    then, now = json.loads(files.provenance.read_text()).get("packages", {}), package_versions()
    return [
        f"{name} is another: {now.get(name, 'not installed')}, was {then[name]}"
        for name in packages
        if name in then and then[name] != now.get(name)
    ]


def trial_files(settings: ServiceSettings, study: str, trial: int) -> TrialFolder:
    """The folder of a stored trial, where it is at hand."""
    from service.trial_book import trial_folder

    return TrialFolder(trial_folder(study_dir(settings, study), trial))
