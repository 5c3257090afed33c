"""`caddie sweep clean`: free the disk of what no trial of interest needs."""

from __future__ import annotations

from typing import Annotated

import typer

from service.commands.looking import OutOption, StorageOption, StudyArgument
from service.commands.study_files import study_dir, tracking_uri
from service.commands.terminal import JsonFlag, make_table, output, print_json
from service.config import load_settings, mask_passwords

KEEP = 10


def clean(
    study: StudyArgument,
    keep: Annotated[
        int,
        typer.Option("--keep", min=0, metavar="K", help="Best rows and newest trials left alone."),
    ] = KEEP,
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove them; without this, only show what would go.")
    ] = False,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove artifacts and checkpoints that nobody needs any more, also while the sweep runs.

    Kept: the best, confirmed, newest and unfinished trials, and those that others start from.
    Results, metrics and configurations of all trials stay, and so does what MLflow has.
    """
    from service.cleaning import kept_trials, removals, remove, sources_of
    from service.reports.study_view import view_trials
    from service.study import load_study, study_names
    from service.tracking.outbox import is_unsent

    settings = load_settings({"storage": storage, "out": out})
    loaded = load_study(study, settings.storage_url)
    views = view_trials(loaded, study_dir(settings, study))
    others = (load_study(name, settings.storage_url) for name in study_names(settings.storage_url))
    kept = kept_trials(loaded, views, keep, sources_of(others))
    target = mask_passwords(tracking_uri(settings))
    kept |= {
        view.number: "not mirrored yet"
        for view in views
        if view.number not in kept and is_unsent(view.folder, target)
    }
    found = removals(loaded, views, kept)
    rows = [
        {"number": each.number, "files": [f.name for f in each.files], "bytes": each.num_bytes}
        for each in found
    ]
    if apply:
        for removal in found:
            remove(removal)
    total = sum(int(str(row["bytes"])) for row in rows)
    if as_json:
        reasons = {str(number): why for number, why in sorted(kept.items())}
        print_json(
            {"study": study, "applied": apply, "removed": rows, "bytes": total, "kept": reasons}
        )
        return
    table = make_table("trial", "files", "bytes", right=("trial", "bytes"))
    for row in rows:
        table.add_row(str(row["number"]), ", ".join(row["files"]), f"{row['bytes']:,}")  # type: ignore[arg-type]
    output().print(table)
    words = "removed" if apply else "would go; --apply removes them"
    output().print(f"{total:,} bytes of {len(rows)} trials {words}; {len(kept)} trials are kept")
