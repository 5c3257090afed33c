"""What a person sees while a sweep runs: a live table on a terminal, plain lines elsewhere.

Everything goes to standard error. TERM=dumb and pipes get the plain lines: one per ended trial
(from ConsoleTracker) and a line of progress now and then. NO_COLOR takes the colours away, not the
table.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from service.status import RunningTrial, SweepStatus, WorkSeconds
from service.tracking.outcome import FAILED, FEASIBLE, INFEASIBLE, REJECTED, STOPPED, outcome_of
from service.tracking.settings_text import describe_settings
from service.trial import TrialFolder, TrialSpec, Verdict
from trainer.report import TrainResult

STYLES = {
    FEASIBLE: "green",
    INFEASIBLE: "yellow",
    REJECTED: "yellow",
    STOPPED: "yellow",
    FAILED: "red",
}
PLAIN_EVERY_S = 15.0
BAR_WIDTH = 12


def is_interactive(console: Console) -> bool:
    """Whether a table may be redrawn in place."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveTable:
    """Shows snapshots of a sweep. Use as a context manager, from one thread.

    Args:
        console: Of standard error.
        gpu_hour_price: Money for an hour of one GPU or worker; 0 = money is left out.
    """

    def __init__(self, console: Console, gpu_hour_price: float = 0.0) -> None:
        self._console = console
        self._price = gpu_hour_price
        self._interactive = is_interactive(console)
        if self._interactive:
            console.soft_wrap = False  # lines longer than the terminal could not be taken back
        self._live = self._make_live()
        self._size = console.size
        self._last = (0.0, "")

    def _make_live(self) -> Live:
        return Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveTable:
        if self._interactive:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, status: SweepStatus) -> None:
        """Redraw, or print a line when there is news and the last line is old enough."""
        if self._interactive:
            self._follow_resize()
            self._live.update(draw(status, self._price), refresh=True)
            return
        line = progress_line(status)
        if line != self._last[1] and time.monotonic() - self._last[0] >= PLAIN_EVERY_S:
            self._last = (time.monotonic(), line)
            self._console.print(Text(line))

    def _follow_resize(self) -> None:
        """A terminal that got narrower has wrapped the old table, and nobody knows into how many
        lines: start on a clean screen."""
        size = self._console.size
        if size != self._size:
            self._size = size
            self._live.stop()
            self._console.clear()
            self._live = self._make_live()
            self._live.start()

    def say(self, message: str, style: str = "") -> None:
        """A line above the table; may be called from any thread."""
        self._console.print(Text(message, style=style))


class ConsoleTracker:
    """A tracker that tells a person how each trial ended."""

    def __init__(self, live: LiveTable) -> None:
        self._live = live

    def trial_started(self, spec: TrialSpec) -> None:
        pass

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        pass

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        launched = result is not None or TrialFolder(spec.folder).metrics.exists()
        outcome = outcome_of(state, verdicts, launched)
        words = f"trial {spec.number:>3}  {outcome.verdict}"
        if result is not None and result.val_bpb is not None:
            words += f"  {result.val_bpb:.4f} bits per byte, {result.bytes_total:,} bytes"
        if outcome.reason:
            words += f": {outcome.reason}"
        self._live.say(words, STYLES.get(outcome.verdict, ""))

    def close(self, grace_seconds: float = 10.0) -> None:
        pass


def draw(status: SweepStatus, gpu_hour_price: float = 0.0) -> Group:
    """The whole picture, what matters most on top: a low terminal cuts the end off."""
    wanted = f" of {status.num_trials}" if status.num_trials else ""
    head = Text(f"{status.study}  ", style="bold")
    head.append(
        f"{status.told}{wanted} trials   feasible {status.feasible}   rejected "
        f"{status.rejected_before_launch}   stopped {status.stopped_while_running}   failed "
        f"{status.states['FAIL']}",
        style="not bold",
    )
    parts: list[Any] = [head]
    if status.best is not None:
        parts.append(
            Text(
                f"best: trial {status.best.number}, {status.best.value:.4f} bits per byte  "
                f"({describe_settings(status.best.params)})",
                style="green",
            )
        )
    parts += [_running_table(status.running), Text(ledger_line(status.gpu_seconds, gpu_hour_price))]
    if status.ended_by:
        causes = ", ".join(f"{name} {count}" for name, count in sorted(status.ended_by.items()))
        parts.append(Text(f"over the budgets: {causes}", style="yellow"))
    for misfit in status.latest_misfits:
        words = f"trial {misfit.number} {misfit.verdict}: {misfit.reason}"
        style = STYLES.get(misfit.verdict, "")
        parts.append(Text(words, style=style, no_wrap=True, overflow="ellipsis"))
    if status.ending:
        parts.append(Text(f"ending: {status.ending}"))
    return Group(*parts)


def ledger_line(work: WorkSeconds, gpu_hour_price: float = 0.0) -> str:
    """ "GPU-hours: 1.20 spent, 3.40 saved (before launch 3.00, while running 0.40)", and money."""
    parts = (work.spent, work.saved, work.saved_before_launch, work.saved_while_running)
    spent, saved, before, during = (seconds / 3600 for seconds in parts)
    line = (
        f"{work.unit.replace('seconds', 'hours')}: {spent:.2f} spent, {saved:.2f} saved "
        f"(before launch {before:.2f}, while running {during:.2f})"
    )
    if gpu_hour_price:
        line += f"; money: {spent * gpu_hour_price:,.2f} spent, {saved * gpu_hour_price:,.2f} saved"
    return line


def progress_line(status: SweepStatus) -> str:
    """The picture in one line."""
    trials = ", ".join(
        f"{trial.number} {trial.state}"
        + (f" step {trial.step}" if trial.step is not None else "")
        + (f" loss {trial.train_loss:.3f}" if trial.train_loss is not None else "")
        for trial in status.running
    )
    wanted = f" of {status.num_trials}" if status.num_trials else ""
    best = f", best {status.best.value:.4f}" if status.best is not None else ""
    return f"{status.told}{wanted} trials, {status.feasible} feasible{best}; now: {trials or '-'}"


def forecast_steps(trial: RunningTrial) -> int | None:
    """Steps at the end of the budget, at the pace so far."""
    if not trial.step or not trial.elapsed_s or trial.train_seconds is None:
        return None
    return int(trial.step / trial.elapsed_s * trial.train_seconds)


def _running_table(running: list[RunningTrial]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("trial", "state", "step", "about", "loss", "clock", "verdicts", "settings"):
        right = column in ("trial", "step", "about", "loss")
        wraps = column in ("verdicts", "settings")
        table.add_column(column, justify="right" if right else "left", no_wrap=not wraps)
    for trial in running:
        steps = forecast_steps(trial)
        again = f" (try {trial.attempt})" if trial.attempt > 1 else ""
        table.add_row(
            str(trial.number),
            trial.state + again,
            "-" if trial.step is None else str(trial.step),
            "-" if steps is None else str(steps),
            "-" if trial.train_loss is None else f"{trial.train_loss:.3f}",
            _clock(trial),
            _verdicts(trial),
            describe_settings(trial.params),
        )
    return table


def _verdicts(trial: RunningTrial) -> Text:
    """What the filters expect, as shares of their bounds: "artifact_size 94%"."""
    words = Text()
    for name, share in trial.verdicts.items():
        words.append(f"{name} {share:.0%} ", style="yellow" if share > 1 else "")
    words.rstrip()
    return words if words else Text("-")


def _clock(trial: RunningTrial) -> str:
    if trial.elapsed_s is None:
        return "-"
    if trial.train_seconds is None:
        return f"{trial.elapsed_s:.0f} s"
    share = min(trial.elapsed_s / trial.train_seconds, 1.0)
    full = round(share * BAR_WIDTH)
    bar = "#" * full + "." * (BAR_WIDTH - full)
    return f"{bar} {trial.elapsed_s:.0f}/{trial.train_seconds:.0f} s"
