"""`caddie verify`: prove a submission folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from search_spaces.tracks import TRACKS
from service.commands.data import data_for
from service.commands.terminal import JsonFlag, make_table, messages, output, print_json, say
from service.config import load_settings
from service.errors import UsageError
from service.verify.checks import Check, Value
from service.verify.folder import shown
from trainer.config import TrainConfig


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A submission folder.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Data set that it is scored on."),
    ] = None,
    track: Annotated[
        str | None, typer.Option("--track", help="Budgets; default: those the folder names.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Whether to score the artifact.")
    ] = True,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Run the folder's program, though it may be anybody's."),
    ] = False,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that score.")] = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds that scoring may take.")
    ] = 3600.0,
    as_json: JsonFlag = False,
) -> None:
    """Check a submission folder: bytes, weights, seconds, rules, score. A line a check.

    Exits 1 when a check does not hold. What cannot be checked is said so and does not fail.
    """
    from service.verify.model_checks import Means
    from service.verify.verification import verify as verify_folder

    settings = load_settings({"data": data})

    def find_data(config: TrainConfig) -> Path | str:
        if not score:
            return "--no-score was given"
        try:
            return data_for(config, settings.data, "the artifact")
        except UsageError as error:
            if settings.data is not None:
                raise
            return shown(error, 400)

    means = Means(find_data, run_code, nproc, timeout, say)
    asked = settings.track(track) if track else None
    found = verify_folder(folder, means, asked, {**TRACKS, **settings.tracks})
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found.checks)
    for check in (*found.failures, *found.unchecked):
        messages().print(Text(_line(check)))
    if found.failures:
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    table = make_table("", "check", "value", "bound", "", right=("value", "bound"))
    for check in checks:
        mark = {True: "ok", False: "FAILED", None: "-"}[check.ok]
        value = "-" if check.ok is None else _cell(check.value)
        table.add_row(mark, check.name, value, _cell(check.bound), shown(check.reason, 300))
    output().print(table)


def _line(check: Check) -> str:
    if check.ok is None:
        return f"{check.name}: {check.value}"
    bound = "" if check.bound is None else f", may be {_cell(check.bound)}"
    reason = f" ({shown(check.reason, 300)})" if check.reason else ""
    return f"{check.name} FAILED: {_cell(check.value)}{bound}{reason}"


def _cell(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else value if len(value) < 24 else value[:16] + "..."
