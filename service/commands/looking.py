"""`caddie leaderboard`, `ui`, `doctor`: looking at studies and at the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.study_files import artifact_root, study_dir, tracking_uri
from service.commands.terminal import (
    JsonFlag,
    make_table,
    number,
    output,
    print_json,
)
from service.config import ServiceSettings, load_settings
from service.tracking.settings_text import describe_settings

if TYPE_CHECKING:
    from service.reports.leaderboard import Row
    from service.reports.seed_noise import SeedNoise

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="See `caddie sweep list`.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of studies.")]
StorageOption = Annotated[
    str | None, typer.Option("--storage", metavar="URL", help="Optuna storage.")
]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URL", help="MLflow server or database.")
]


def leaderboard(
    study: StudyArgument,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the feasible trials of a study, best first."""
    from service.reports.leaderboard import as_rows

    settings = load_settings({"storage": storage, "out": out})
    rows, noise = leaderboard_rows(study, settings)
    if as_json:
        return print_json(as_rows(rows))
    show_leaderboard(rows, noise)


def leaderboard_rows(study: str, settings: ServiceSettings) -> tuple[list[Row], SeedNoise]:
    """The leaderboard of a stored study, and the noise it is shrunk by."""
    from service.reports.leaderboard import leaderboard as rank
    from service.reports.leaderboard import noise_of
    from service.reports.study_view import view_trials
    from service.study import load_study

    loaded = load_study(study, settings.storage_url)
    trials = view_trials(loaded, study_dir(settings, study))
    track = settings.track(loaded.user_attrs["track"])
    return rank(trials, track.artifact_bytes), noise_of(trials)


def show_leaderboard(rows: list[Row], noise: SeedNoise, limit: int = 20) -> None:
    """The table for a person."""
    if not rows:
        output().print("no feasible trial yet")
        return
    scores = ("rank", "bits per byte", "expected")
    sizes = ("bytes", "left", "train s", "eval s", "steps", "seeds")
    table = make_table(*scores, "95 %", *sizes, "trials", "settings", right=(*scores, *sizes))
    for row in rows[:limit]:
        interval = "-" if row.interval is None else "{:.4f} .. {:.4f}".format(*row.interval)
        table.add_row(
            str(row.rank),
            number(row.mean),
            number(row.expected),
            interval,
            number(row.bytes_total, 0),
            number(row.bytes_left, 0),
            number(row.train_seconds, 1),
            number(row.eval_seconds, 1),
            number(row.steps, 0),
            str(row.n),
            ",".join(str(trial) for trial in row.numbers),
            describe_settings(row.params or row.overrides) or "-",
        )
    output().print(table)
    if len(rows) > limit:
        output().print(f"... and {len(rows) - limit} more; --json lists all")
    lone = "one seed each: no interval. " if all(row.n == 1 for row in rows) else ""
    output().print(
        f"{lone}Seeds move a score by {noise}; expected: the mean, shrunk by that noise, which is "
        "what ranks"
    )


def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]")] = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    out: OutOption = None,
) -> None:
    """Serve the MLflow UI and optuna-dashboard on loopback until Ctrl-C."""
    from service.study import load_study, open_storage
    from service.ui import serve

    settings = load_settings({"storage": storage, "tracking_uri": tracking, "out": out})
    if study is not None:
        opened = (study, load_study(study, settings.storage_url)._study_id)
    else:
        opened = None
        settings.out.mkdir(parents=True, exist_ok=True)
        open_storage(settings.storage_url)
    root = artifact_root(settings) or ""
    serve(
        settings.storage_url,
        tracking_uri(settings),
        root,
        opened,
        settings.out.absolute(),
        output().print,
    )


def doctor(
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    out: OutOption = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="RAY", help="Ray cluster.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check what this machine has, and say what to do about what it lacks."""
    from service.doctor import as_rows, examine

    settings = load_settings(
        {"storage": storage, "tracking_uri": tracking, "out": out, "address": address}
    )
    findings = examine(settings.out, settings.storage_url, tracking_uri(settings), settings.address)
    if as_json:
        print_json(as_rows(findings))
    else:
        table = make_table("check", "ok", "found", "do")
        for finding in findings:
            mark = "yes" if finding.ok else "[red]no[/red]"
            table.add_row(finding.check, mark, finding.detail, finding.remedy)
        output().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
