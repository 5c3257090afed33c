"""The last words of a sweep: what is best, what did not fit and why, its cost, where to look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.commands.looking import show_leaderboard
from service.commands.study_files import study_dir
from service.commands.terminal import make_table, output
from service.config import ServiceSettings
from service.tracking.outcome import FEASIBLE, RUNNING
from service.tracking.settings_text import describe_settings

if TYPE_CHECKING:
    import optuna

    from service.reports.study_view import TrialView
    from service.status import SweepStatus, WorkSeconds

MAX_REASONS = 15


def show_summary(
    name: str, study: optuna.Study, status: SweepStatus, settings: ServiceSettings
) -> None:
    """Print it to standard output."""
    from service.reports.leaderboard import leaderboard, noise_of
    from service.reports.study_view import view_trials
    from service.reports.trade_picture import FILE

    trials = view_trials(study, study_dir(settings, name))
    console = output()
    console.print(f"\n[bold]Leaderboard of {name}[/bold]  (bits per byte of the packed artifact)")
    rows = leaderboard(trials, settings.track(status.track).artifact_bytes)
    show_leaderboard(rows, noise_of(trials))
    _show_misfits([trial for trial in trials if trial.outcome.verdict not in (FEASIBLE, RUNNING)])
    console.print()
    if status.best is not None:
        best = status.best
        console.print(
            f"Best feasible trial: {best.number}, {best.value:.4f} bits per byte, with "
            f"{describe_settings(best.params)}"
        )
    spent = status.gpu_seconds
    console.print(
        f"{spent.unit} of training: {spent.spent:,.0f} spent; saved "
        f"{spent.saved_before_launch:,.0f} by rejecting before launch and "
        f"{spent.saved_while_running:,.0f} by stopping early"
    )
    show_ledger(spent, settings.gpu_hour_price)
    unfinished = status.states["RUNNING"] + status.states["WAITING"]
    if status.num_trials is not None and status.told < status.num_trials:
        console.print(
            f"{status.told} of {status.num_trials} trials are told, {unfinished} are in the queue; "
            "the same command goes on"
        )
    elsewhere = "" if settings.out == ServiceSettings().out else f" --out {settings.out}"
    picture = study_dir(settings, name) / FILE
    if picture.exists():
        console.print(f"Bytes against loss: {picture}")
    console.print("Look further:")
    console.print(f"  caddie ui {name}{elsewhere}")
    shown = status.best.number if status.best is not None else 0
    console.print(f"  caddie trial show {name} {shown}{elsewhere}")


def show_ledger(seconds: WorkSeconds, price: float = 0.0) -> None:
    """Where all of it went, in shares, and what trials cost."""
    from service.ledger import WORDS

    if seconds.total <= 0:
        return
    shares = (
        f"{word} {getattr(seconds, word) / seconds.total:.0%}" for word in (*WORDS, "running")
    )
    held = seconds.total - seconds.queue
    cost = f", {held / 3600 * price:,.2f} at {price:g} an hour" if price else ""
    console = output()
    console.print(
        f"{seconds.unit} in all: {seconds.total:,.0f}, of which trials held {held:,.0f}{cost}: "
        + ", ".join(shares)
    )


def _show_misfits(misfits: list[TrialView]) -> None:
    if not misfits:
        return
    console = output()
    console.print("\n[bold]Not on the leaderboard[/bold]")
    table = make_table("trial", "verdict", "why", right=("trial",))
    for trial in misfits[:MAX_REASONS]:
        table.add_row(str(trial.number), trial.outcome.verdict, trial.outcome.reason)
    console.print(table)
    if len(misfits) > MAX_REASONS:
        console.print(f"... and {len(misfits) - MAX_REASONS} more")
