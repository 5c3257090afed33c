"""`caddie train`: one run without a sweep, in this process or under torchrun."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from service.commands.data import data_for
from service.commands.recipe_config import configured
from service.commands.terminal import (
    JsonFlag,
    SetOption,
    make_table,
    messages,
    number,
    output,
    print_json,
    say,
)
from service.errors import RunnerError, UsageError
from service.trial import TrialFolder, TrialSpec, write_json
from trainer.compile_cache import use_compile_cache
from trainer.config import TrainConfig
from trainer.report import EventKind, FileReporter, TrainResult, describe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="See `caddie recipes`.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Data set; default: the embedded corpus."),
]

POLL_S = 0.2


def train(
    recipe: RecipeArgument,
    sets: SetOption = None,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run's files.")
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes (torchrun).")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", help="Sets runtime.seed.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train one configuration, pack it, and score the packed file."""
    config, _ = configured(recipe, sets, seed)
    config = config.with_overrides({"data.dir": str(data_for(config, data, recipe))})
    folder = out or Path("caddie-runs") / "train" / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "result.json").exists():
        raise UsageError(f"{folder} already holds a run; give another --out")
    result = run(config, folder.resolve(), nproc)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        show_result(result, folder)
    if result.status == "stopped":
        raise typer.Exit(1)


def run(config: TrainConfig, folder: Path, nproc: int) -> TrainResult:
    """Train into `folder`, which then holds config.json, metrics.jsonl ... result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = TrialFolder(folder)
    files.clear_run()
    write_json(files.config, config.to_dict())
    if nproc > 1:
        return _run_processes(config, folder, nproc)
    use_compile_cache(config.runtime.compile_cache)
    say("loading torch")
    from trainer.loop import train as train_here

    with ProgressReporter(folder, config) as reporter:
        result = train_here(config, reporter, folder)
    write_json(files.result, result.model_dump(mode="json"))
    return result


def show_result(result: TrainResult, folder: Path) -> None:
    """The outcome for a person."""
    table = make_table("", "")
    if result.status == "stopped":
        table.add_row("stopped", result.stop_reason or "")
    table.add_row("bits per byte", number(result.val_bpb))
    table.add_row("before quantisation", number(result.val_bpb_prequant))
    table.add_row("validation loss", f"{number(result.val_loss)} nats per token")
    table.add_row(
        "bytes",
        f"{number(result.bytes_total, 0)} = code {number(result.bytes_code, 0)} + model "
        f"{number(result.bytes_model, 0)}",
    )
    table.add_row("steps", f"{result.steps:,} of {number(result.step_ms, 1)} ms")
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases.items())
    table.add_row("seconds", phases)
    table.add_row("files", str(folder))
    output().print(table)


class ProgressReporter(FileReporter):
    """A FileReporter that also draws a bar on a terminal, or prints plain lines elsewhere."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        console = messages()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            refresh_per_second=2,  # the run is on the clock: do not take its processor
            disable=not console.is_terminal,
        )
        super().__init__(folder, echo=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=1.0, news="")

    def __enter__(self) -> ProgressReporter:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._metrics.close()
        self._log.close()

    def emit(self, kind: EventKind, **fields: Any) -> None:
        super().emit(kind, **fields)
        if kind == "step":
            news = f"step {fields['step']}  loss {fields['train_loss']:.4f}"
            self._bar.update(
                self._task, description="training", completed=fields["progress"], news=news
            )
        elif kind == "phase":
            self._bar.update(self._task, description=f"after {fields['name']}")


def _run_processes(config: TrainConfig, folder: Path, nproc: int) -> TrainResult:
    """Under torchrun, by the runner that sweeps use, which leaves no process behind."""
    from service.runners.base import Demand, RunState
    from service.runners.local_runner import LocalRunner, visible_gpus

    on_gpus = config.runtime.device != "cpu" and bool(visible_gpus())
    demand = Demand(nproc, gpus_per_worker=1.0 if on_gpus else 0.0, cpus_per_worker=1.0)
    spec = TrialSpec("train", 0, "", {}, config, folder, nproc, demand.gpus_per_worker)
    runner = LocalRunner(num_cpus=max(nproc, len(os.sched_getaffinity(0))))
    try:
        runner.submit(spec, demand)
        while True:
            update = runner.poll(spec.number)
            for event in update.events:
                say(describe(event))
            if update.result is not None:
                return update.result
            if update.state in (RunState.FAILED, RunState.OUT_OF_MEMORY):
                raise RunnerError(update.error or f"the run failed; see {folder / 'train.log'}")
            time.sleep(POLL_S)
    finally:
        runner.close()
