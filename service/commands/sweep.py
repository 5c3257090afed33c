"""`caddie sweep run|status|stop|list`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.looking import (
    OutOption,
    StorageOption,
    StudyArgument,
    TrackingOption,
)
from service.commands.sweep_driver import Plan, drive, make_plan, mirror_leftovers
from service.commands.sweep_summary import show_ledger, show_summary
from service.commands.terminal import (
    JsonFlag,
    SetOption,
    make_table,
    number,
    output,
    print_json,
    say,
)
from service.commands.train import DataOption
from service.config import ServiceSettings, load_settings

if TYPE_CHECKING:
    from optuna import Study


SpaceArgument = Annotated[str, typer.Argument(metavar="SPACE", help="See `caddie spaces`.")]
NameOption = Annotated[
    str | None, typer.Option("--study", metavar="NAME", help="Default: the space's name.")
]
NewFlag = Annotated[
    bool, typer.Option("--new", help="A fresh study: adds -2, -3 ... to a name in use.")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Instead of the space's own recipe.")
]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", min=1, help="Trials of the study in all.")
]
RunnerOption = Annotated[
    str | None, typer.Option("--runner", help="ray (default), or local: torchrun here.")
]
IsolationOption = Annotated[
    str | None,
    typer.Option("--isolation", help="trial (default), or resident: processes that stay."),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="RAY", help="Ray cluster to join.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers-per-trial", min=1, help="Processes per trial.")
]
GpusOption = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="GPUs of each process.")
]
CpusOption = Annotated[
    float | None, typer.Option("--cpus-per-worker", min=0, help="CPUs of each process.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of the sampler.")]
MaxHoursOption = Annotated[
    float | None,
    typer.Option("--max-gpu-hours", metavar="H", help="That the study's trials may hold."),
]
PriceOption = Annotated[
    float | None, typer.Option("--gpu-hour-price", min=0, metavar="P", help="For --max-cost.")
]
MaxCostOption = Annotated[
    float | None, typer.Option("--max-cost", metavar="C", help="As --max-gpu-hours, in money.")
]
GraceOption = Annotated[
    float | None, typer.Option("--grace", min=0, metavar="S", help="For running trials at Ctrl-C.")
]


def run(
    space: SpaceArgument,
    study: NameOption = None,
    new: NewFlag = False,
    recipe: RecipeOption = None,
    trials: TrialsOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    out: OutOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    runner: RunnerOption = None,
    isolation: IsolationOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    gpus: GpusOption = None,
    cpus: CpusOption = None,
    seed: SeedOption = None,
    max_gpu_hours: MaxHoursOption = None,
    gpu_hour_price: PriceOption = None,
    max_cost: MaxCostOption = None,
    grace: GraceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a study, or go on with the one of this name.

    Ctrl-C or SIGTERM once: no new trials, running ones may finish within the grace. Twice: stop
    now. The study can be resumed either way, by the same command.
    """
    settings = load_settings(
        {
            "trials": trials,
            "data": data,
            "out": out,
            "storage": storage,
            "tracking_uri": tracking,
            "runner": runner,
            "isolation": isolation,
            "address": address,
            "workers_per_trial": workers,
            "gpus_per_worker": gpus,
            "cpus_per_worker": cpus,
            "seed": seed,
            "grace_seconds": grace,
            "max_gpu_hours": max_gpu_hours,
            "gpu_hour_price": gpu_hour_price,
            "max_cost": max_cost,
        }
    )
    plan = make_plan(space, study, new, sets, settings, recipe)
    from service.status import status_of

    opened, ended_well = _run_to_end(plan, settings)
    if as_json:
        print_json(status_of(opened).to_dict())
    else:
        show_summary(plan.name, opened, status_of(opened), settings)
    if not ended_well:
        raise typer.Exit(1)


def _run_to_end(plan: Plan, settings: ServiceSettings) -> tuple[Study, bool]:
    """The study and whether its sweep ended well; a finished one is only mirrored."""
    from service.status import status_of
    from service.study import open_study

    opened = open_study(
        plan.name,
        settings.storage_url,
        plan.space,
        track=plan.track,
        overrides=plan.overrides,
        seed=settings.seed,
    )
    before = status_of(opened)
    if before.told < settings.trials or before.states["RUNNING"]:
        return opened, drive(plan, opened)
    say(
        f"study {plan.name} is finished: {before.told} trials of {settings.trials}. Ask for "
        "more with --trials, or start afresh with --new"
    )
    mirror_leftovers(plan, opened)
    return opened, True


def status(
    study: StudyArgument,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say where a study stands, whoever runs it."""
    from service.live import draw
    from service.status import status_of
    from service.study import load_study

    settings = load_settings({"storage": storage, "out": out})
    found = status_of(load_study(study, settings.storage_url))
    if as_json:
        return print_json(found.to_dict())
    console = output()
    console.print(draw(found, settings.gpu_hour_price))
    show_ledger(found.gpu_seconds, settings.gpu_hour_price)
    console.print(f"driver: {found.driver or 'nobody works on it'}")


def stop(
    study: StudyArgument,
    grace: Annotated[
        float | None, typer.Option("--grace", min=0, metavar="S", help="For running trials.")
    ] = None,
    storage: StorageOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask a running sweep, on whatever machine, to end; its study can be resumed."""
    from service.status import status_of
    from service.study import ask_to_stop, load_study

    settings = load_settings({"storage": storage, "out": out, "grace_seconds": grace})
    loaded = load_study(study, settings.storage_url)
    driver = status_of(loaded).driver
    if driver is not None:
        ask_to_stop(loaded, settings.grace_seconds)
    if as_json:
        return print_json({"study": study, "driver": driver, "asked": driver is not None})
    if driver is None:
        output().print(f"nobody works on study {study}")
    else:
        output().print(
            f"asked process {driver} to stop: no new trials, {settings.grace_seconds:g} s for the "
            "running ones"
        )


def list_studies(
    storage: StorageOption = None, out: OutOption = None, as_json: JsonFlag = False
) -> None:
    """List the studies of a storage."""
    from service.status import status_of
    from service.study import load_study, study_names

    url = load_settings({"storage": storage, "out": out}).storage_url
    found = [status_of(load_study(name, url)) for name in study_names(url)]
    if as_json:
        return print_json([each.to_dict() for each in found])
    numbers = ("trials", "feasible", "best")
    table = make_table("study", "space", "track", *numbers, "driver", right=numbers)
    for each in found:
        best = number(each.best.value if each.best is not None else None)
        row = (str(each.told), str(each.feasible), best, each.driver or "-")
        table.add_row(each.study, each.space, each.track, *row)
    output().print(table if found else "no studies yet; start one with `caddie sweep run`")
