"""`caddie simulate`: the real scheduler on pretended nodes, in simulated time."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.looking import StorageOption
from service.commands.terminal import JsonFlag, make_table, named, output, print_json
from service.errors import UsageError

if TYPE_CHECKING:
    from service.simulate import Load, Simulated


SpaceArgument = Annotated[str, typer.Argument(metavar="SPACE", help="See `caddie spaces`.")]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Pretended nodes.")]
GpusOption = Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of each.")]
TrialsOption = Annotated[int, typer.Option("--trials", min=1, help="COMPLETE or PRUNED.")]
TrialSecondsOption = Annotated[
    float,
    typer.Option("--trial-seconds", metavar="S", help="A trial's own work, from compilation."),
]
FailuresOption = Annotated[
    float, typer.Option("--failures", metavar="RATE", help="Share of attempts that are lost.")
]
GangsOption = Annotated[
    str, typer.Option("--gangs", metavar="N,N...", help="GPUs of a trial; several take turns.")
]
StartOption = Annotated[
    float | None,
    typer.Option(
        "--start-seconds",
        metavar="S",
        help="From submission to a trial's own work; default: as measured for one TorchTrainer per "
        "trial.",
    ),
]
TeardownOption = Annotated[
    float | None,
    typer.Option("--teardown-seconds", metavar="S", help="From its end until its GPUs are free."),
]
BadNodesOption = Annotated[
    int, typer.Option("--bad-nodes", min=0, help="Nodes on which every attempt fails.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the sampler and of chance.")]


def simulate(
    space: SpaceArgument,
    nodes: NodesOption = 64,
    gpus_per_node: GpusOption = 8,
    trials: TrialsOption = 2000,
    trial_seconds: TrialSecondsOption = 600.0,
    failures: FailuresOption = 0.0,
    gangs: GangsOption = "8",
    start: StartOption = None,
    teardown: TeardownOption = None,
    bad_nodes: BadNodesOption = 0,
    seed: SeedOption = 0,
    storage: StorageOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a pretended sweep: scheduler, filters, sampler and storage are real, trials are not.

    Nothing is trained and nothing is kept, except in a --storage that you name.
    """
    chosen = _space(space)
    from service.simulate import START_S, TEARDOWN_S, Load, Simulation

    load = Load(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        trials=trials,
        trial_s=trial_seconds,
        failure_rate=failures,
        gangs=_gangs(gangs),
        start_s=START_S if start is None else start,
        teardown_s=TEARDOWN_S if teardown is None else teardown,
        bad_nodes=bad_nodes,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="caddie-simulate-") as folder:
        found = Simulation(chosen, load, Path(folder), storage_url=storage).run()
    if as_json:
        return print_json(as_document(found))
    _show(load, found)


def as_document(found: Simulated) -> dict[str, Any]:
    """The JSON of the command; the trials by state stand beside the other fields."""
    fields = asdict(found)
    states = fields.pop("states")
    return {**fields, "trials": states}


def _space(name: str) -> Any:
    from search_spaces import SPACES

    return named("space", name, SPACES)


def _gangs(text: str) -> tuple[int, ...]:
    try:
        gangs = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--gangs {text!r}: give numbers of GPUs, such as 1,2,4,8") from None
    return gangs


def _show(load: Load, found: Simulated) -> None:
    console = output()
    states = ", ".join(f"{count} {state}" for state, count in found.states.items() if count)
    table = make_table("", "", right=("",))
    rows = {
        "GPU-busy fraction while trials were left to start": f"{found.busy_fraction:.2%}",
        "the same until the last trial was told": f"{found.busy_fraction_to_the_end:.2%}",
        "simulated hours": f"{found.simulated_hours:,.2f}",
        "gap between trials on a GPU, p50 / p95": f"{found.gap_s['p50']:.1f} / "
        f"{found.gap_s['p95']:.1f} s",
        "trials": states,
        "seconds of this simulation (of the scheduler)": f"{found.wall_s:,.0f} "
        f"({found.driver_s:,.0f})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(
        f"{load.nodes} nodes of {load.gpus_per_node} GPUs, {load.trials} trials of "
        f"{load.trial_s:g} s on {', '.join(map(str, load.gangs))} GPUs; {load.start_s:g} s to "
        f"start one, {load.teardown_s:g} s to free it"
    )
    console.print(table)
