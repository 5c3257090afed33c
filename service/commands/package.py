"""`caddie package`: a trial as a folder that anyone can run and check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands.looking import StorageOption, StudyArgument
from service.commands.study_files import study_dir
from service.commands.terminal import JsonFlag, output, print_json
from service.config import load_settings
from service.errors import UsageError

NumberArgument = Annotated[int, typer.Argument(metavar="N", min=0, help="Trial number.")]


def package(
    study: StudyArgument,
    trial: NumberArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.")],
    storage: StorageOption = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="DIR", help="Folder of studies.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a submission folder: one self-contained train_gpt.py, the packed model, the records."""
    from service.submission import SeedRun, read_run, write_submission

    settings = load_settings({"storage": storage, "out": runs})
    folder, others, track = _folders(study, trial, settings)
    first = read_run(folder)
    same = first.config.with_overrides({"runtime.seed": 0})
    seeds: dict[int, SeedRun] = {first.seed: first}
    for other in others:
        try:
            run = read_run(other)
        except UsageError:
            continue  # of another fate, or on another machine
        if run.config.with_overrides({"runtime.seed": 0}) == same:
            seeds.setdefault(run.seed, run)
    document = write_submission(list(seeds.values()), out, f"{study} trial {trial}", track)
    sizes = {key: document[key] for key in ("bytes_code", "bytes_model", "bytes_total")}
    if as_json:
        return print_json({"dir": str(out.resolve()), **sizes})
    output().print(
        f"{out}: {sizes['bytes_total']:,} bytes, {sizes['bytes_code']:,} of code and "
        f"{sizes['bytes_model']:,} of model; {document['val_bpb']:.6f} bits per byte"
    )


def _folders(study: str, trial: int, settings: Any) -> tuple[Path, list[Path], str]:
    """Of the trial, of the others, and the name of the study's track."""
    from service.reports.study_view import view_trials
    from service.study import load_study

    found = load_study(study, settings.storage_url)
    views = view_trials(found, study_dir(settings, study))
    if trial >= len(views):
        known = f"0 to {len(views) - 1}" if views else "none yet"
        raise UsageError(f"study {study!r} has no trial {trial}; its trials are {known}")
    view = views[trial]
    if view.duplicate_of is not None:
        view = views[view.duplicate_of]
    others = [other.folder for other in views if other.number != view.number]
    return view.folder, others, str(found.user_attrs.get("track", ""))
