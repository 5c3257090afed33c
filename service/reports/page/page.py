"""The report of a study: one HTML file that needs no network, no script and no other file.

Jinja2 escapes every text; the charts are matplotlib's. A Content-Security-Policy in the page
forbids whatever might slip through.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from optuna.trial import TrialState

from service.reports.leaderboard import Row, leaderboard, mean_interval, noise_of
from service.reports.page.charts import Curve, curve_chart, importance_chart, trade_chart
from service.reports.study_view import TrialView
from service.reports.trade_picture import points_of
from service.status import SweepStatus, WorkSeconds
from service.study import CONFIRMS, SEED_PATH, frozen_trials
from service.tracking.outbox import new_records
from service.tracking.outcome import FEASIBLE, RUNNING
from service.tracking.settings_text import describe_settings
from service.trial import TrialFolder

TEMPLATE = "page.html.j2"
MAX_ROWS = 30
MAX_RECORDS = 20_000
NEEDED_FOR_IMPORTANCE = 4
SECONDS_PER_HOUR = 3600.0
Table = list[list[str]]


def draw_page(
    study: optuna.Study,
    trials: Sequence[TrialView],
    status: SweepStatus,
    cap: int | None,
    gpu_hour_price: float = 0.0,
) -> str:
    """The whole page.

    Args:
        study: Open study, for importances.
        trials: All of its trials.
        status: Its snapshot.
        cap: Bytes that an artifact may have; None = no cap.
        gpu_hour_price: Money for an hour of one GPU or worker; 0 = money is left out.
    """
    rows = leaderboard(trials, cap)
    best = trials[rows[0].numbers[0]] if rows else None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template(TEMPLATE).render(
        status=status,
        recipe=study.user_attrs.get("recipe", "?"),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(status, rows, gpu_hour_price),
        noise=str(noise_of(trials)),
        charts=_charts(study, trials, rows, cap),
        more_rows=max(0, len(rows) - MAX_ROWS),
        confirm_command=f"caddie confirm {shlex.quote(study.study_name)} --trial "
        f"{best.number if best is not None else 'N'} --seeds 5",
        price_note=f"at {gpu_hour_price:g} an hour (gpu_hour_price of caddie.toml)"
        if gpu_hour_price
        else "",
        replay=_replay(study.study_name, best) if best is not None else "",
        replay_note=_provenance(best) if best is not None else "",
        **_headings(status.gpu_seconds.unit, gpu_hour_price),
        board=[_board_row(row) for row in rows[:MAX_ROWS]],
        confirmations=_confirmations(study),
        seeds=_seed_rows(trials, rows),
        misfits=_misfits(study, trials),
        ledger=_ledger(study, status.gpu_seconds, gpu_hour_price),
    )
    return _without_control_characters(page)


def _headings(unit: str, gpu_hour_price: float) -> dict[str, list[tuple[str, bool]]]:
    """The columns of every table.

    Args:
        unit: Of work, such as "GPU-seconds".
    """
    places = ("rank", "bits per byte", "expected", "95 % interval", "bytes", "bytes left")
    costs = ("train s", "eval s", "steps", "seeds", "trials", "settings")
    scores = ("settings", "seeds", "scores", "deviation", "95 % interval")
    sides = ("pair", "side", "seeds", "mean", "deviation")
    misfits = ("trial", "verdict", "filter", "after", f"{unit} saved", "why")
    money = ("money",) if gpu_hour_price else ()
    return {
        "board_columns": _columns(*places, *costs, words=("trials", "settings")),
        "confirm_columns": _columns(*sides, words=("pair", "side")),
        "seed_columns": _columns(*scores, words=("settings", "scores")),
        "misfit_columns": _columns(*misfits, words=("verdict", "filter", "why")),
        "ledger_columns": _columns("", unit, "hours", *money, words=("",)),
    }


def _columns(*names: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """(name, whether it holds numbers)."""
    return [(name, name not in words) for name in names]


def _facts(
    status: SweepStatus, rows: Sequence[Row], gpu_hour_price: float
) -> list[tuple[str, str]]:
    work = status.gpu_seconds
    facts = [
        (_number(rows[0].mean) if rows else "-", "best bits per byte"),
        (str(status.told), "trials" + (f" of {status.num_trials}" if status.num_trials else "")),
        (str(status.feasible), "feasible"),
        (str(status.rejected_before_launch), "rejected before launch"),
        (str(status.stopped_while_running), "stopped while running"),
        (f"{work.spent / SECONDS_PER_HOUR:.2f}", work.unit.replace("seconds", "hours") + " spent"),
        (f"{work.saved / SECONDS_PER_HOUR:.2f}", "saved"),
    ]
    if gpu_hour_price:
        facts.append((f"{work.spent / SECONDS_PER_HOUR * gpu_hour_price:,.2f}", "money spent"))
    return facts


def _board_row(row: Row) -> list[str]:
    return [
        str(row.rank),
        _number(row.mean),
        _number(row.expected),
        _interval(row.interval),
        _number(row.bytes_total, 0),
        _number(row.bytes_left, 0),
        _number(row.train_seconds, 1),
        _number(row.eval_seconds, 1),
        _number(row.steps, 0),
        str(row.n),
        ", ".join(str(number) for number in row.numbers),
        describe_settings(row.params or row.overrides) or "the recipe as it is",
    ]


def _charts(
    study: optuna.Study, trials: Sequence[TrialView], rows: Sequence[Row], cap: int | None
) -> list[tuple[str, Markup]]:
    drawn = [
        ("Bytes against loss", trade_chart(points_of(trials), cap)),
        ("Training", curve_chart(_curves(trials, rows))),
        ("What matters (fANOVA, by Optuna)", importance_chart(importances(study))),
    ]
    return [(name, Markup(chart)) for name, chart in drawn if chart]


def _curves(trials: Sequence[TrialView], rows: Sequence[Row]) -> list[Curve]:
    """Of the best trial of each row, then of what ended without a place, as far as they fit."""
    best = [row.numbers[0] for row in rows[:6]]
    others = [trial.number for trial in trials if not trial.is_feasible][:4]
    found = []
    for number in [*best, *others]:
        records, _ = new_records(trials[number].folder, 0, MAX_RECORDS)
        steps = [(r["elapsed_s"], float(r["train_loss"])) for r in records if r["kind"] == "step"]
        finite = [(seconds, loss) for seconds, loss in steps if math.isfinite(loss)]
        found.append(Curve(number, [s for s, _ in finite], [x for _, x in finite], number in best))
    return [curve for curve in found if len(curve.seconds) > 1]


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of the score's variance by setting, where enough trials say so; else {}."""
    scored = frozen_trials(study, TrialState.COMPLETE)
    axes = [path for path in study.user_attrs.get("axes", {}) if path != SEED_PATH]
    varied = [
        path
        for path in axes
        if all(path in trial.params for trial in scored)
        and len({trial.params[path] for trial in scored}) > 1
    ]
    if len(scored) < NEEDED_FOR_IMPORTANCE or not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            return optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=varied
            )
        except (RuntimeError, ValueError):  # no variance at all
            return {}


def _confirmations(study: optuna.Study) -> Table:
    sides: dict[tuple[str, str], list[float]] = defaultdict(list)
    for trial in frozen_trials(study, TrialState.COMPLETE):
        attrs = trial.user_attrs
        if CONFIRMS in attrs and trial.value is not None:
            sides[attrs[CONFIRMS], attrs.get("confirms_side", "?")].append(trial.value)
    return [
        [pair, side, str(len(values)), _number(statistics.fmean(values), 5), _deviation(values)]
        for (pair, side), values in sorted(sides.items())
    ]


def _seed_rows(trials: Sequence[TrialView], rows: Sequence[Row]) -> Table:
    found = []
    for row in rows:
        values = [value for n in row.numbers if (value := trials[n].value) is not None]
        if len(values) > 1:
            scores = ", ".join(
                f"{_number(trials[n].value)} (seed {trials[n].seed})" for n in row.numbers
            )
            settings = describe_settings(row.params or row.overrides) or "the recipe as it is"
            interval = _interval(mean_interval(values))
            found.append([settings, str(row.n), scores, _deviation(values), interval])
    return found


def _misfits(study: optuna.Study, trials: Sequence[TrialView]) -> Table:
    rows = []
    for view, trial in zip(trials, frozen_trials(study), strict=False):
        if view.outcome.verdict in (FEASIBLE, RUNNING):
            continue
        trained = view.result.phases.get("train") if view.result is not None else None
        rows.append(
            [
                str(view.number),
                view.outcome.verdict,
                str(trial.user_attrs.get("filter", "-")),
                "-" if trained is None else f"{trained:,.1f} s",
                _number(trial.user_attrs.get("saved_s", 0.0), 0),
                view.outcome.reason or "-",
            ]
        )
    return rows


def _ledger(study: optuna.Study, work: WorkSeconds, gpu_hour_price: float) -> Table:
    """Where the work went, and what each filter saved."""
    saved: dict[str, float] = defaultdict(float)
    for trial in frozen_trials(study):
        if trial.user_attrs.get("saved_s"):
            saved[str(trial.user_attrs.get("filter", "?"))] += trial.user_attrs["saved_s"]
    lines = [("spent on training", work.spent)]
    lines += [
        ("saved by rejecting before launch", work.saved_before_launch),
        ("saved by stopping early", work.saved_while_running),
    ]
    lines += [(f"of which by {name}", seconds) for name, seconds in sorted(saved.items())]
    return [
        [name, _number(seconds, 0), _number(seconds / SECONDS_PER_HOUR, 3)]
        + ([_number(seconds / SECONDS_PER_HOUR * gpu_hour_price, 2)] if gpu_hour_price else [])
        for name, seconds in lines
    ]


def _replay(study: str, best: TrialView) -> str:
    """Commands that run the best trial again, within the study's files and from nothing."""
    lines = [f"caddie trial rerun {shlex.quote(study)} {best.number}"]
    if best.recipe is not None:
        lines += ["", "# or from nothing:", *_from_nothing(best)]
    return "\n".join(lines)


def _from_nothing(best: TrialView) -> list[str]:
    provenance = _read_provenance(best)
    commit = (provenance.get("code") or {}).get("commit")
    words = ["caddie", "train", str(best.recipe)]
    data = best.overrides.get("data.dir")
    for path, value in best.overrides.items():
        if path not in ("data.dir", SEED_PATH):
            text = value if isinstance(value, str) else json.dumps(value)
            words += ["--set", f"{path}={text}"]
    words += ["--data", str(data)] if data else []
    words += ["--seed", str(best.seed)] if best.seed is not None else []
    words += ["--nproc", str(best.workers)]
    checkout = [f"git checkout {commit}"] if commit else []
    return [*checkout, shlex.join(words)]


def _provenance(best: TrialView) -> str:
    provenance = _read_provenance(best)
    code = provenance.get("code") or {}
    notes = [f"trial {best.number}"]
    if provenance.get("data_digest"):
        notes.append(f"data {provenance['data_digest']}")
    if code.get("diff") or code.get("untracked"):
        notes.append("the code differed from its commit: provenance.json has the difference")
    if best.result is not None and best.result.artifact_sha256:
        notes.append(f"artifact sha256 {best.result.artifact_sha256}")
    return "; ".join(notes)


def _read_provenance(trial: TrialView) -> dict[str, Any]:
    path = TrialFolder(trial.folder).provenance
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _deviation(values: Sequence[float]) -> str:
    return _number(statistics.stdev(values), 5) if len(values) > 1 else "-"


def _without_control_characters(text: str) -> str:
    """Such bytes have no place in HTML, and a log or a name may hold them."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and c != "\x7f"))
