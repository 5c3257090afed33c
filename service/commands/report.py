"""`caddie report`: a study as one HTML page to send to somebody."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from service.commands.looking import StorageOption, StudyArgument
from service.commands.study_files import study_dir
from service.commands.terminal import JsonFlag, output, print_json
from service.config import load_settings
from service.errors import UsageError


def report(
    study: StudyArgument,
    to: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page; replaced if it is there.")
    ],
    storage: StorageOption = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="DIR", help="Folder of studies.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write one self-contained page: leaderboard, pictures, seeds, what was saved, how to replay.

    It needs no network and runs no script; it can be mailed and read on a phone.
    """
    from service.reports.page.page import draw_page
    from service.reports.study_view import view_trials
    from service.status import status_of
    from service.study import load_study

    settings = load_settings({"storage": storage, "out": runs})
    if to.is_dir():
        raise UsageError(
            f"--out {to}: is a folder; give the name of a file, such as {to}/page.html"
        )
    loaded = load_study(study, settings.storage_url)
    attrs = loaded.user_attrs
    cap = {**attrs.get("budget", {})}.get("artifact_bytes")
    cap = attrs.get("overrides", {}).get("budget.artifact_bytes", cap)
    trials = view_trials(loaded, study_dir(settings, study))
    page = draw_page(loaded, trials, status_of(loaded), cap, settings.gpu_hour_price)
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(to.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, to)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if as_json:
        return print_json({"file": str(to.absolute())})
    output().print(f"{to.absolute()}  ({to.stat().st_size:,} bytes)", soft_wrap=True)
