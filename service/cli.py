"""`caddie`: the command line. What each command does is in service/commands/.

Exit codes: 0 done, 1 the work failed, 2 asked wrongly. Errors are one message without a traceback;
--debug, anywhere on the line, shows it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import typer
from rich.text import Text

from service.commands import (
    catalogue,
    clean,
    confirm,
    data,
    estimate,
    looking,
    package,
    repair,
    report,
    simulate,
    sweep,
    train,
    trial,
    verify,
)
from service.commands.terminal import messages
from service.errors import SweepError, UsageError
from trainer.errors import ConfigError, TrainerError

app = typer.Typer(
    help="Sweeps of small language models under hard budgets of bytes and seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Make data sets: tokenizer and shards.", no_args_is_help=True)
sweep_app = typer.Typer(help="Run, watch and stop sweeps.", no_args_is_help=True)
trial_app = typer.Typer(help="Look at one trial, or replay it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(sweep_app, name="sweep")
app.add_typer(trial_app, name="trial")


@app.callback(epilog="Example: caddie sweep run smoke --trials 12")
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """--debug is taken off the line by `main`, so that it may stand anywhere; this documents it."""


def _add(group: typer.Typer, name: str, command: Callable[..., object], example: str) -> None:
    group.command(name, epilog=f"Example: {example}", no_args_is_help=False)(command)


_add(app, "recipes", catalogue.recipes, "caddie recipes --json")
_add(app, "spaces", catalogue.spaces, "caddie spaces --json")
_add(app, "tracks", catalogue.tracks, "caddie tracks --json")
_add(data_app, "demo", data.demo, "caddie data demo --out caddie-data/demo")
_add(data_app, "prepare", data.prepare, "caddie data prepare a.txt.xz --vocab-size 1024 --out DIR")
_add(data_app, "fetch", data.fetch, "caddie data fetch sp1024 --out caddie-data/sp1024")
_add(app, "estimate", estimate.estimate, "caddie estimate golf_baseline --set model.num_layers=11")
_add(app, "train", train.train, "caddie train tiny --set optim.matrix_lr=0.03 --seed 1")
_add(sweep_app, "run", sweep.run, "caddie sweep run smoke --trials 12 --workers-per-trial 2")
_add(sweep_app, "status", sweep.status, "caddie sweep status smoke --json")
_add(sweep_app, "stop", sweep.stop, "caddie sweep stop smoke")
_add(sweep_app, "repair", repair.repair, "caddie sweep repair smoke --apply")
_add(sweep_app, "clean", clean.clean, "caddie sweep clean smoke --keep 20 --apply")
_add(sweep_app, "list", sweep.list_studies, "caddie sweep list")
_add(trial_app, "show", trial.show, "caddie trial show smoke 3")
_add(trial_app, "explain", trial.explain, "caddie trial explain smoke 3")
_add(trial_app, "rerun", trial.rerun, "caddie trial rerun smoke 3")
_add(
    app, "simulate", simulate.simulate, "caddie simulate learning_rates --nodes 64 --failures 0.01"
)
_add(app, "leaderboard", looking.leaderboard, "caddie leaderboard smoke --json")
_add(app, "confirm", confirm.confirm, "caddie confirm smoke --trial 11 --seeds 5 --against smoke:0")
_add(app, "report", report.report, "caddie report smoke --out smoke.html")
_add(app, "package", package.package, "caddie package smoke 3 --out submission")
_add(app, "verify", verify.verify, "caddie verify submission --data caddie-data/sp1024 --json")
_add(app, "ui", looking.ui, "caddie ui smoke")
_add(app, "doctor", looking.doctor, "caddie doctor --json")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        app(args=given, prog_name="caddie")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # `caddie ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        _explain(error)
        return 2 if isinstance(error, UsageError | ConfigError) else 1
    return 0


def _explain(error: Exception) -> None:
    """One message on standard error: expected errors in their own words, others by name."""
    if isinstance(error, SweepError | TrainerError):
        message = f"error: {error}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = (
            f"error: {error.filename or 'a file under --out'}: {error.strerror}; free some space, "
            "then give the same command again: finished trials are kept, and a trial that was "
            "interrupted is run again"
        )
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        message = f"error: {where}{error.strerror}"
    else:
        message = (
            f"error: {type(error).__name__}: {error}\nrun it again with --debug for the traceback"
        )
    messages().print(Text(message, style="red"))


if __name__ == "__main__":
    sys.exit(main())
