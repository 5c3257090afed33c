"""`caddie sweep repair`: shows what differs between storage, folders and MLflow, and mends it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.looking import OutOption, StorageOption, StudyArgument, TrackingOption
from service.commands.study_files import artifact_root, dashboard_page, study_dir, tracking_uri
from service.commands.terminal import JsonFlag, make_table, output, print_json, say, warn
from service.config import ServiceSettings, load_settings, mask_passwords

if TYPE_CHECKING:
    import optuna

    from service.repair import Finding
    from service.tracking.mlflow_repair import MlflowRepair


def repair(
    study: StudyArgument,
    apply: Annotated[
        bool, typer.Option("--apply", help="Mend it; without this, only show what differs.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Of MLflow: sizes and last values, not every byte and point."),
    ] = False,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what differs between a study's storage, its folders and MLflow; --apply mends it.

    Exits with 1 when something is left that --apply could not mend.
    """
    from service.repair import StudyRepair, work_off
    from service.tracking.outbox import folders_with_entries

    settings = load_settings({"storage": storage, "out": out, "tracking_uri": tracking})
    folder = study_dir(settings, study)
    with _undriven(study, settings, apply) as opened:
        mlflow = _mlflow(opened, folder, settings, quick, apply)
        fetch = None if mlflow is None else mlflow.copy_of
        track = opened.user_attrs.get("track", "")
        parts = StudyRepair(opened, folder, track, time.time, fetch, apply)
        findings = work_off(parts.faults(), apply)
        if mlflow is not None:
            findings += work_off(mlflow.faults(folders_with_entries(folder)), apply)
    left = sum(not finding.mended for finding in findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print_json({"study": study, "applied": apply, "findings": rows, "left": left})
    else:
        _show(findings, apply)
    if mlflow is None or (apply and left):
        raise typer.Exit(1)


@contextmanager
def _undriven(study: str, settings: ServiceSettings, apply: bool) -> Iterator[optuna.Study]:
    """The study, while nobody works on it; with its lease, where something is written."""
    from service.lease import DriverLease, refuse_if_driven
    from service.study import load_study

    loaded = load_study(study, settings.storage_url, for_writing=apply)
    if not apply:
        refuse_if_driven(loaded, time.time())
        yield loaded
        return
    lease = DriverLease(loaded, time.time)
    try:
        yield loaded
    finally:
        lease.release()


def _mlflow(
    study: optuna.Study, folder: Path, settings: ServiceSettings, quick: bool, apply: bool
) -> MlflowRepair | None:
    """The study's mirror; None, and a warning, when it cannot be looked at."""
    from service.tracking.mlflow_tracker import quiet_mlflow, study_id

    uri = tracking_uri(settings)
    quiet_mlflow()
    try:
        from mlflow.tracking import MlflowClient

        from service.tracking.mlflow_mirror import MlflowMirror
        from service.tracking.mlflow_repair import MlflowRepair, find_study_id

        if not (folder / "study_id").exists():
            found = find_study_id(MlflowClient(uri), folder)
            if found is not None:
                say(f"{folder / 'study_id'} is missing; MLflow has it as {found}")
            if apply:
                folder.mkdir(parents=True, exist_ok=True)
                known = study_id(folder, found)
            else:
                known = found or "not sent yet"
        else:
            known = study_id(folder)
        page = dashboard_page(settings, study)
        mirror = MlflowMirror(uri, study.study_name, known, artifact_root(settings), page)
        repair = MlflowRepair(mirror, quick)
        repair.connect()
    except Exception as error:  # whatever the client raises
        words = " ".join(mask_passwords(str(error)).split())[:160]
        warn(
            f"MLflow at {mask_passwords(uri)} cannot be used ({type(error).__name__}: {words}); "
            "only storage and folders are compared. Repair again when it is back"
        )
        return None
    return repair


def _show(findings: list[Finding], apply: bool) -> None:
    if not findings:
        output().print("nothing differs: storage, folders and MLflow say the same")
        return
    table = make_table("trial", "where", "what", "remedy", "", right=("trial",))
    for each in findings:
        state = "mended" if each.mended else ("" if each.can_mend else "cannot be mended")
        number = "-" if each.trial is None else str(each.trial)
        table.add_row(number, each.where, each.what, each.remedy, state)
    output().print(table)
    if not apply and any(each.can_mend for each in findings):
        output().print("this only looked; --apply mends")
