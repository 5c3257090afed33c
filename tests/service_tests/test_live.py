"""What is shown while a sweep runs: a table where it can be redrawn, lines where it cannot."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from service.live import (
    ConsoleTracker,
    LiveTable,
    draw,
    forecast_steps,
    is_interactive,
    ledger_line,
)
from service.status import BestTrial, Misfit, RunningTrial, SweepStatus, WorkSeconds
from service.trial import TrialSpec, Verdict
from trainer.recipes import RECIPES

RUNNING = RunningTrial(
    7,
    {"optim.matrix_lr": 0.031234},
    "running",
    2,
    30,
    2.0,
    train_seconds=8.0,
    train_loss=4.56789,
    verdicts={"artifact_size": 0.94},
)
STATUS = SweepStatus(
    study="s",
    space="smoke",
    track="laptop",
    states={"COMPLETE": 3, "PRUNED": 2, "FAIL": 1, "RUNNING": 1, "WAITING": 0},
    num_trials=12,
    rejected_before_launch=1,
    stopped_while_running=1,
    feasible=2,
    ended_by={"artifact_size": 1, "step_time": 1},
    best=BestTrial(4, 2.34567, {"optim.matrix_lr": 0.05}),
    running=[RUNNING],
    gpu_seconds=WorkSeconds(3600.0, 7200.0, 1800.0, "GPU-seconds"),
    latest_misfits=[Misfit(5, "rejected before launch", "about 249,369 bytes against 200,000")],
    driver=None,
)


def text_of(width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(STATUS))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_holds_what_one_wants_to_know() -> None:
    text = text_of()
    assert "5 of 12 trials" in text
    assert "feasible 2   rejected 1   stopped 1   failed 1" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("7"))
    assert row.split() == [
        *("7", "running", "(try", "2)", "30", "120", "4.568"),
        *("###.........", "2/8", "s", "artifact_size", "94%", "optim.matrix_lr=0.03123"),
    ]
    assert "best: trial 4, 2.3457 bits per byte" in text
    assert "artifact_size 1, step_time 1" in text
    assert "GPU-hours: 1.00 spent, 2.50 saved (before launch 2.00, while running 0.50)" in text
    assert "trial 5 rejected before launch: about 249,369 bytes against 200,000" in text
    assert "money" not in text


def test_money_is_shown_where_an_hour_has_a_price() -> None:
    line = ledger_line(STATUS.gpu_seconds, gpu_hour_price=2.0)
    assert line.endswith("money: 2.00 spent, 5.00 saved")


def test_forecast_extends_the_pace_to_the_budget() -> None:
    assert forecast_steps(RUNNING) == 120
    assert forecast_steps(RunningTrial(0, {})) is None


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), (None, None)])
def test_a_table_is_only_redrawn_on_a_terminal_that_can(
    variable: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    console = Console(file=io.StringIO(), force_terminal=True)
    assert is_interactive(console) is (variable != "TERM")
    assert not is_interactive(Console(file=io.StringIO()))


def test_plain_lines_come_once_and_without_control_codes(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    live = LiveTable(console)
    config = RECIPES["tiny"].build()
    spec = TrialSpec("s", 3, "tiny", {}, config, tmp_path)
    over = Verdict("artifact_size", 2.0, 1.0, "bytes", False, "2 bytes, cap 1", True)
    with live:
        live.show(STATUS)
        live.show(STATUS)
        ConsoleTracker(live).trial_ended(spec, "PRUNED", [over], None)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "5 of 12 trials, 2 feasible, best 2.3457; now: 7 running step 30 loss 4.568",
        "trial   3  rejected before launch: 2 bytes, cap 1",
    ]
