"""`caddie confirm`: is a trial really better, or was it lucky? Fresh seeds and Welch's test."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from service.commands.looking import (
    OutOption,
    StorageOption,
    StudyArgument,
    TrackingOption,
    leaderboard_rows,
)
from service.commands.study_files import study_dir
from service.commands.sweep_driver import (
    SHOW_EVERY_S,
    TURN_S,
    StopSignals,
    log_to,
    make_runner,
    trackers_of,
)
from service.commands.terminal import (
    JsonFlag,
    make_table,
    messages,
    number,
    output,
    print_json,
    say,
    warn,
)
from service.commands.train import DataOption
from service.commands.trial import changes_since
from service.config import ServiceSettings, load_settings
from service.errors import UsageError
from service.trial import TrialFolder
from trainer.config import TrainConfig

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from service.confirm import Confirmation, Plan, Seed, Side, Standing
    from service.live import LiveTable

PLANS_ATTR = "confirmations"
"""Study attribute: key of a confirmation -> what was planned for it."""


TrialsOption = Annotated[
    list[int],
    typer.Option("--trial", metavar="N", min=0, help="A candidate; several share the incumbent."),
]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Of each side, at most.")]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="STUDY:M",
        help="The incumbent; default: the study's best other configuration; none: no test.",
    ),
]
RuleOption = Annotated[
    Literal["strict", "loose"],
    typer.Option(
        "--rule", help="Which rule ends the run early: 0.005 nats at p < 0.01, or p < 0.25."
    ),
]
FixedFlag = Annotated[
    bool, typer.Option("--fixed", help="Look once, after all seeds, at the rule's full level.")
]
NewFlag = Annotated[
    bool, typer.Option("--new", help="Begin again with other seeds; chance adds up.")
]
AtOnceOption = Annotated[
    int, typer.Option("--at-once", min=1, help="Runs in flight; 1 = all on one gang.")
]
RunnerOption = Annotated[
    str | None, typer.Option("--runner", help="ray (default), or local: torchrun here.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="RAY", help="Ray cluster to join.")
]
GraceOption = Annotated[
    float | None, typer.Option("--grace", min=0, metavar="S", help="For runs at Ctrl-C.")
]


def confirm(
    study: StudyArgument,
    trial: TrialsOption,
    seeds: SeedsOption = 5,
    against: AgainstOption = None,
    rule: RuleOption = "strict",
    fixed: FixedFlag = False,
    new: NewFlag = False,
    at_once: AtOnceOption = 1,
    data: DataOption = None,
    out: OutOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    runner: RunnerOption = None,
    address: AddressOption = None,
    grace: GraceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run fresh seeds of trials, by turns with the incumbent, and say whether they are records.

    Interrupted or killed, the same command goes on. A candidate ends early when the rule is met or
    has become out of reach; the looks on the way are paid for out of the rule's p, which several
    candidates share.
    """
    given: dict[str, Any] = {"data": data, "out": out, "storage": storage, "tracking_uri": tracking}
    given |= {"runner": runner, "address": address, "grace_seconds": grace}
    question = _Question(study, trial, load_settings(given))
    rival = question.rival(against)
    if rival is not None and seeds < 2:
        raise UsageError("--seeds 1: a test needs at least two of each side; ask for --seeds 2")
    documents = question.answer(rival, seeds, rule, fixed, new, at_once)
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        _show(documents)
    if any(document["ended_by"] in ("REQUESTED", "IN_VAIN") for document in documents):
        raise typer.Exit(1)


class _Question:
    """The candidates, and the parts it takes to run them."""

    def __init__(self, study: str, trials: list[int], settings: ServiceSettings) -> None:
        if len(set(trials)) < len(trials):
            raise UsageError("--trial: each candidate once; their seeds are --seeds")
        self._settings = settings
        self._study, self._trials = study, trials
        self._workers: tuple[int, float] = (1, 0.0)
        self._digest = ""

    def rival(self, against: str | None) -> tuple[str, int] | None:
        """(study, trial) of the incumbent; None = there is none."""
        if against is not None and against.lower() == "none":
            return None
        if against is not None:
            name, colon, place = against.rpartition(":")
            if not colon or not place.isdecimal():
                raise UsageError(f"--against {against}: write it as STUDY:M, such as smoke:3")
            if name == self._study and int(place) in self._trials:
                raise UsageError(f"--against {against}: that is the candidate itself")
            return name, int(place)
        for row in leaderboard_rows(self._study, self._settings)[0]:
            if not set(self._trials) & set(row.numbers):
                return self._study, row.numbers[0]
        return None

    def answer(
        self,
        rival: tuple[str, int] | None,
        seeds: int,
        rule: str,
        fixed: bool,
        new: bool,
        at_once: int,
    ) -> list[dict[str, Any]]:
        """Run what is missing and say what it shows of each candidate."""
        from service.confirm import INCUMBENT, Confirmation
        from service.live import LiveTable
        from service.runners.base import Demand

        live = LiveTable(messages(), self._settings.gpu_hour_price)
        trackers: dict[str, list[Any]] = {}
        candidates = [
            self._side(self._name(trial), self._study, trial, live, trackers)
            for trial in self._trials
        ]
        incumbent = self._side(INCUMBENT, *rival, live, trackers) if rival is not None else None
        plan = _plan(candidates, incumbent, seeds, rule, fixed, new)
        workers, gpus = self._workers
        demand = Demand(workers, gpus, self._settings.cpus_per_worker)
        with log_to(live), StopSignals() as signals:
            say(f"confirming {plan.key}: starting {self._settings.runner}")
            runner = make_runner(self._settings)
            try:
                run = Confirmation(plan, candidates, incumbent, runner, demand, at_once)
            except BaseException:
                runner.close()
                raise
            signals.are_heard = True
            try:
                with live:
                    _loop(run, candidates, signals, live, self._settings.grace_seconds)
            finally:
                run.close()
                for tracker in (each for ours in trackers.values() for each in ours):
                    tracker.close()
        return [_document(plan, candidate, incumbent, run) for candidate in candidates]

    def _name(self, trial: int) -> str:
        from service.confirm import CANDIDATE

        return CANDIDATE if len(self._trials) == 1 else f"{CANDIDATE} {trial}"

    def _side(
        self, name: str, study: str, trial: int, live: LiveTable, trackers: dict[str, list[Any]]
    ) -> Side:
        from service.confirm import Side
        from service.filters import default_filters
        from service.judge import Judge
        from service.provenance import collect
        from service.runners.base import Demand
        from service.study import SEED_PATH
        from service.tracking.outbox import read_entry
        from service.trial_book import TrialBook
        from trainer.data.dataset import Dataset
        from trainer.recipes import RECIPES

        settings = self._settings
        loaded, frozen, files, config = _trial_to_confirm(study, trial, settings)
        digest = Dataset.open(config.data.dir).digest
        if not self._digest:  # the first candidate
            entry = read_entry(files.path)
            self._workers = (entry.workers, entry.gpus_per_worker) if entry else (1, 0.0)
            self._digest = digest
        elif digest != self._digest:
            raise UsageError(
                f"trial {study}:{trial} was scored on another data set than {self._study}:"
                f"{self._trials[0]}; their losses cannot be compared. Give both the same --data"
            )
        if study not in trackers:
            trackers[study] = trackers_of(loaded, settings, live)
        recipe = loaded.user_attrs["recipe"]
        base = RECIPES[recipe].build()
        given = {SEED_PATH, *frozen.params}
        demand = Demand(*self._workers)
        book = TrialBook(
            study=loaded,
            base=base,
            recipe=recipe,
            overrides={k: v for k, v in config.difference(base).items() if k not in given},
            study_dir=study_dir(settings, study),
            demand_of=lambda _: demand,
            provenance=collect(data_digest=digest),
            trackers=trackers[study],
            clock=time.time,
        )
        judge = Judge(default_filters(settings.size_limit, loaded.user_attrs["track"]))
        return Side(name, loaded, frozen, book, judge)


def _trial_to_confirm(
    study: str, number: int, settings: ServiceSettings
) -> tuple[optuna.Study, FrozenTrial, TrialFolder, TrainConfig]:
    """A scored trial whose folder is here, with the settings to run it again."""
    from service.study import frozen_trials, load_study
    from service.trial_book import trial_folder

    loaded = load_study(study, settings.storage_url)
    trials = frozen_trials(loaded)
    if number >= len(trials):
        raise UsageError(f"study {study!r} has no trial {number}; it has {len(trials)} trials")
    frozen = trials[number]
    if frozen.state.name != "COMPLETE":
        verdict = frozen.user_attrs.get("verdict", frozen.state.name)
        raise UsageError(
            f"trial {study}:{number} has no score ({verdict}); choose one of `caddie leaderboard "
            f"{study}`"
        )
    files = TrialFolder(trial_folder(study_dir(settings, study), number))
    if not files.config.exists():
        raise UsageError(f"{files.config}: no such file; give the --out that the sweep had")
    config = TrainConfig.from_dict(json.loads(files.config.read_text()))
    if settings.data is not None:
        config = config.with_overrides({"data.dir": str(settings.data.resolve())})
    for difference in changes_since(files, config):
        warn(f"{study}:{number}: {difference}")
    return loaded, frozen, files, config


def _plan(
    candidates: list[Side],
    incumbent: Side | None,
    seeds: int,
    rule: str,
    fixed: bool,
    new: bool,
) -> Plan:
    """What the first call of this question planned; it must not change with what was seen."""
    from service.confirm import Plan
    from service.reports.significance import LOOSE, STRICT

    study = candidates[0].study
    key = f"{study.study_name}:{','.join(str(side.of.number) for side in candidates)}"
    if incumbent is not None:
        key += f" against {incumbent.study.study_name}:{incumbent.of.number}"
    plans: dict[str, Any] = study.user_attrs.get(PLANS_ATTR, {})
    earlier = [name for name in plans if name == key or name.startswith(f"{key} #")]
    if new and earlier:
        say(f"this pair was confirmed {len(earlier)} times before: the chance of luck adds up")
        key = f"{key} #{len(earlier) + 1}"
    elif earlier:
        key = earlier[-1]
    asked = {"seeds": seeds, "rule": rule, "fixed": fixed}
    if key in plans and incumbent is not None and plans[key] != asked:
        then = ", ".join(f"{name} {value}" for name, value in plans[key].items())
        raise UsageError(
            f"the confirmation {key} was planned with {then}: another plan after a look would void "
            "its p. Give the same, or begin again with --new"
        )
    study.set_user_attr(PLANS_ATTR, {**plans, key: asked})
    return Plan(key, seeds, STRICT if rule == "strict" else LOOSE, fixed)


def _loop(
    run: Confirmation,
    candidates: list[Side],
    signals: StopSignals,
    live: LiveTable,
    grace_s: float,
) -> None:
    from service.status import status_of

    shown, obeyed = 0.0, 0
    pairs = dict.fromkeys((side.of.number for side in candidates), 0)
    while run.step():
        if signals.count > obeyed:
            obeyed = signals.count
            run.stop_asking(0.0 if obeyed > 1 else grace_s)
            live.say("stopping; the same command goes on")
        for side in candidates:
            standing = run.standing(side)
            done = min(len(standing.candidate), len(standing.incumbent))
            if done > pairs[side.of.number]:
                pairs[side.of.number] = done
                live.say(f"trial {side.of.number}: {_progress(standing, done)}")
        if time.monotonic() - shown >= SHOW_EVERY_S:
            live.show(status_of(candidates[0].study, running=run.rows()))
            shown = time.monotonic()
        time.sleep(TURN_S)


def _progress(standing: Standing, pairs: int) -> str:
    if standing.test is None or standing.strict is None:
        return f"{pairs} pair done"
    return (
        f"{pairs} pairs: {standing.test.margin:+.5f} nats better, p {standing.strict.p_value:.4f} "
        f"of the strict rule against {standing.strict.level:.4f} at this look"
    )


def _document(
    plan: Plan, candidate: Side, incumbent: Side | None, run: Confirmation
) -> dict[str, Any]:
    standing = run.standing(candidate)
    test, rules = standing.test, candidate.study.user_attrs["track"]
    stopped = run.stopped_by(candidate)
    tested = incumbent is not None and test is not None
    return {
        "study": candidate.study.study_name,
        "trial": candidate.of.number,
        "against": f"{incumbent.study.study_name}:{incumbent.of.number}" if incumbent else None,
        **_describe(standing.candidate),
        "p_value": test.p_value() if test is not None else None,
        "margin_nats": test.margin if test is not None else None,
        "record": standing.meets(standing.strict) if tested else None,
        "record_loose": standing.meets(standing.loose) if tested else None,
        "margin_interval": test.interval() if test is not None else None,
        "strict": asdict(standing.strict) if standing.strict is not None else None,
        "loose": asdict(standing.loose) if standing.loose is not None else None,
        "incumbent": _describe(standing.incumbent) if incumbent is not None else None,
        "track": rules,
        "planned": plan.num_pairs,
        "ended_by": stopped.name if stopped is not None else None,
        "reason": standing.broken or (stopped.value if stopped is not None else None),
    }


def _describe(seeds: list[Seed]) -> dict[str, Any]:
    """Bits per byte of one side."""
    from service.reports.leaderboard import mean_interval

    values = [seed.bpb for seed in seeds if math.isfinite(seed.bpb)]
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "interval": mean_interval(values),
        "seeds": [seed.seed for seed in seeds],
        "trials": [seed.number for seed in seeds],
    }


def _show(documents: list[dict[str, Any]]) -> None:
    """For a person: all sides in one table, then what was found of each candidate."""
    console = output()
    columns = ("seeds", "bits per byte", "deviation")
    table = make_table("", *columns, "95 % of the mean", "trials", right=columns)
    rows = [(f"{document['study']}:{document['trial']}", document) for document in documents]
    if documents[0]["incumbent"] is not None:
        rows.append((documents[0]["against"], documents[0]["incumbent"]))
    for name, side in rows:
        interval = "-" if side["interval"] is None else "{:.5f} .. {:.5f}".format(*side["interval"])
        trials = ",".join(map(str, side["trials"]))
        values = (str(side["n"]), number(side["mean"], 5), number(side["std"], 5))
        table.add_row(name, *values, interval, trials)
    console.print(table)
    for document in documents:
        if len(documents) > 1:
            console.print(f"\n{document['study']}:{document['trial']}")
        _show_verdict(document)


def _show_verdict(document: dict[str, Any]) -> None:
    console = output()
    if document["margin_nats"] is not None:
        low, high = document["margin_interval"]
        console.print(
            f"better by {document['margin_nats']:+.5f} nats per token (95 %: {low:+.5f} .. "
            f"{high:+.5f}); Welch's one-sided p of no gain: {document['p_value']:.4f}"
        )
        for name, record, words in (
            ("strict", document["record"], "0.005 nats at p < 0.01"),
            ("loose", document["record_loose"], "any gain at p < 0.25"),
        ):
            judged = document[name]
            detail = (
                ""
                if judged is None
                else (f": p {judged['p_value']:.4f}, this look allows {judged['level']:.4f}")
            )
            console.print(f"{words}: {'RECORD' if record else 'not a record'}{detail}")
    if document["reason"]:
        console.print(f"ended: {document['reason']}")
