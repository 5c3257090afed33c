"""Fresh seeds of one configuration, interleaved with those of another, until a test can tell.

One seed proves nothing, and the best of many trials was partly lucky. So a chosen trial is run
again with seeds that nothing has used, in pairs with the incumbent, candidate first and incumbent
first by turns, so that a drift of the machine hits both alike. After each pair
service/reports/significance.py looks whether the track's rule is met, or is out of reach.

Several candidates share the incumbent's seeds: A1 A2 B, B A2 A1, ... Each ends by itself; the p of
the rule is divided among them, so that the chance of any false record stays below it.

Seeds are trials of their studies, marked with CONFIRMS: the leaderboard sees them, a sweep does not
count them. Killed at any point, the same call goes on: what is told is kept, what was in flight
runs again under its number and seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import optuna
from optuna.trial import FrozenTrial, TrialState

from service.errors import RunnerError
from service.judge import Judge
from service.lease import DriverLease
from service.policies import Policy, is_overdue
from service.reports.significance import (
    FUTILE_BELOW,
    LOOSE,
    STRICT,
    Look,
    RecordRule,
    Welch,
    look,
    welch,
)
from service.run import Run
from service.runners.base import Demand, Runner, RunState, Update
from service.status import RunningTrial
from service.study import (
    CONFIRMS,
    SEED_PATH,
    add_seed,
    forget_stop,
    frozen_trials,
    requeue,
    stop_grace,
    take_up,
)
from service.teller import Teller
from service.tracking.outcome import FAILED, FEASIBLE
from service.trial_book import TrialBook, note_stop

LOOK_FOR_STOP_S = 1.0
MAX_IN_VAIN = 3
"""Seeds in a row of one side that end without a score: then something is wrong."""
CANDIDATE, INCUMBENT = "candidate", "incumbent"


class Stop(Enum):
    """Why no more seeds are run; the value is a sentence for people."""

    RECORD = "the rule is met"
    FUTILE = "meeting the rule has become too unlikely to go on"
    ENOUGH = "all planned seeds are run"
    BROKEN = "a seed of the candidate does not keep the budgets"
    IN_VAIN = "seeds end without a score: see `caddie trial show` and their train.log"
    REQUESTED = "asked to stop; the same command goes on"


@dataclass(frozen=True)
class Seed:
    """A told run of one side."""

    number: int
    seed: int
    loss: float
    """Nats per token of the decoded artifact."""
    bpb: float
    verdict: str
    reason: str


@dataclass
class Side:
    """One of the configurations."""

    name: str
    """INCUMBENT, or what tells this candidate from others."""
    study: optuna.Study
    of: FrozenTrial
    """The trial whose configuration is run."""
    book: TrialBook
    judge: Judge
    seeds: dict[int, Seed] = field(default_factory=dict)
    """Place in the order of pairs -> what was measured there."""
    in_vain: int = 0
    """Ends without a score since the last one with a score."""

    @property
    def is_candidate(self) -> bool:
        return self.name != INCUMBENT

    @property
    def in_order(self) -> list[Seed]:
        """The seeds up to the first place that is still open."""
        found: list[Seed] = []
        while len(found) in self.seeds:
            found.append(self.seeds[len(found)])
        return found

    @property
    def losses(self) -> list[float]:
        return [seed.loss for seed in self.in_order]


@dataclass(frozen=True)
class Plan:
    """What was decided before the first seed. Changed later, the error guarantee would be void."""

    key: str
    """Such as "smoke:7 against smoke:0"; marks the trials."""
    num_pairs: int
    """Seeds of each side."""
    rule: RecordRule = STRICT
    """Meeting it ends the run early."""
    fixed: bool = False
    """One look, at the end."""


@dataclass(frozen=True)
class Standing:
    """What the seeds so far say."""

    candidate: list[Seed]
    incumbent: list[Seed]
    test: Welch | None
    """Of all whole pairs, in nats per token."""
    strict: Look | None
    loose: Look | None
    broken: str | None
    """Why the candidate cannot be a record, whatever its loss; None = nothing is wrong with it."""

    def meets(self, judged: Look | None) -> bool:
        return judged is not None and judged.holds and self.broken is None


class Confirmation:
    """Runs the pairs. Call `step` from one thread until it returns False, then `close`.

    Args:
        plan: What to run.
        candidates: The configurations in question, with names of their own.
        incumbent: What it must beat; None = only its own mean and deviation are asked for.
        runner: Where seeds run.
        demand: Workers of every seed.
        at_once: Seeds in flight together; 1 = all on the same gang.
        policy: How often failures are tried again.
        clock: Wall-clock seconds.

    Raises:
        StudyBusyError: A sweep works on one of the studies.
    """

    def __init__(
        self,
        plan: Plan,
        candidates: Sequence[Side],
        incumbent: Side | None,
        runner: Runner,
        demand: Demand,
        at_once: int = 1,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = plan
        self._candidates = list(candidates)
        self._incumbent = incumbent
        self._sides = [*candidates] if incumbent is None else [*candidates, incumbent]
        self._runner = runner
        self._demand = demand
        self._at_once = at_once
        self._policy = policy or Policy()
        self._clock = clock
        self._leases = _lease_all(self._sides, clock)
        forget_stop(self._candidates[0].study)
        self._running: dict[tuple[str, int], Run] = {}
        """(side, place) -> its run."""
        self._stop: Stop | None = None
        """Why nothing more is started."""
        self._ends: dict[str, Stop] = {}
        """Name of a candidate -> why it gets no more seeds."""
        self._stop_by = math.inf
        self._looked_for_stop = -math.inf
        self._left: dict[tuple[str, int], int] = {}
        """(side, place) -> number of an unfinished trial of an earlier call."""
        for side in self._sides:
            self._take_stock(side)
            side.in_vain = 0  # whoever calls again has mended what was wrong
        self._decide()

    def stopped_by(self, candidate: Side) -> Stop | None:
        """Why no more seeds of a candidate are started; None while they are."""
        return self._ends.get(candidate.name, self._stop)

    def step(self) -> bool:
        """One turn: never waits for a run. True while work remains."""
        for lease in self._leases:
            lease.renew()
        self._look_for_stop()
        for place, run in list(self._running.items()):
            self._attend(place, run)
        self._decide()
        if self._stop is None:
            self._put_back(self._is_decided)
            self._launch()
        elif self._clock() >= self._stop_by or self._stop is not Stop.REQUESTED:
            self._put_back()
        return self._stop is None or bool(self._running)

    def stop_asking(self, grace_s: float) -> None:
        """Start no more seeds; what still runs after the grace goes back into the queue."""
        self._stop = self._stop or Stop.REQUESTED
        self._stop_by = min(self._stop_by, self._clock() + grace_s)

    def standing(self, candidate: Side) -> Standing:
        """The test of a candidate as of now."""
        incumbent = self._incumbent
        theirs = incumbent.losses if incumbent is not None else []
        pairs = min(len(candidate.losses), len(theirs))
        ours, theirs = candidate.losses[:pairs], theirs[:pairs]
        return Standing(
            candidate=candidate.in_order,
            incumbent=incumbent.in_order if incumbent is not None else [],
            test=welch(ours, theirs),
            strict=self._look(ours, theirs, STRICT),
            loose=self._look(ours, theirs, LOOSE),
            broken=next((s.reason for s in candidate.in_order if s.verdict != FEASIBLE), None),
        )

    def rows(self) -> list[RunningTrial]:
        """Seeds in flight, for the live table."""
        return [run.row() for run in self._running.values()]

    def close(self) -> None:
        """End what runs, leaving it in the queue, and let the next driver in."""
        try:
            self._put_back()
            for lease in self._leases:
                lease.release()
        finally:
            self._runner.close()

    # --- what there is ----------------------------------------------------------------------

    def _take_stock(self, side: Side) -> None:
        """Seeds of earlier calls, told or left behind; also those that a sweep has told."""
        for trial in frozen_trials(side.study):
            attrs = trial.user_attrs
            if attrs.get(CONFIRMS) != self._plan.key or attrs["confirms_side"] != side.name:
                continue
            place = attrs["confirms_place"]
            if trial.state.is_finished():
                self._note_end(side, place, trial)
            else:
                self._left[side.name, place] = trial.number

    def _note_end(self, side: Side, place: int, trial: FrozenTrial) -> None:
        result = side.book.folder(trial.number).read_result()
        verdict, reason = trial.user_attrs.get("verdict", FAILED), trial.user_attrs.get("reason")
        bpb = trial.value if trial.state == TrialState.COMPLETE else None
        loss = result.val_loss if result is not None else None
        if bpb is None or loss is None or not math.isfinite(loss):
            if side.is_candidate and trial.state == TrialState.PRUNED:
                loss = bpb = math.inf  # it diverged or was too slow: that counts against it
            else:
                side.in_vain += 1
                return
        side.in_vain = 0
        seed = int(trial.params[SEED_PATH])
        words = f"seed {seed} (trial {trial.number}): {reason}" if reason else ""
        side.seeds[place] = Seed(trial.number, seed, loss, bpb, verdict, words)

    # --- decisions --------------------------------------------------------------------------

    def _look(
        self, ours: Sequence[float], theirs: Sequence[float], rule: RecordRule
    ) -> Look | None:
        if not all(map(math.isfinite, [*ours, *theirs])):
            return None
        shared = replace(rule, alpha=rule.alpha / len(self._candidates))
        return look(ours, theirs, self._plan.num_pairs, shared, self._plan.fixed)

    def _decide(self) -> None:
        if self._stop is not None:
            return
        for candidate in self._candidates:
            if candidate.name not in self._ends:
                end = self._end_of(candidate)
                if end is not None:
                    self._ends[candidate.name] = end
        if any(side.in_vain >= MAX_IN_VAIN for side in self._sides):
            self._stop = Stop.IN_VAIN
        elif len(self._ends) == len(self._candidates):
            self._stop = self._ends[self._candidates[-1].name]

    def _end_of(self, candidate: Side) -> Stop | None:
        """Whether a candidate's seeds decide its case."""
        standing = self.standing(candidate)
        judged = standing.loose if self._plan.rule == LOOSE else standing.strict
        against = [candidate, self._incumbent] if self._incumbent else [candidate]
        if standing.broken is not None and self._incumbent is not None:
            return Stop.BROKEN
        if standing.meets(judged) and not self._plan.fixed:
            return Stop.RECORD
        if all(len(side.seeds) >= self._plan.num_pairs for side in against):
            return Stop.ENOUGH
        if judged is not None and judged.chance < FUTILE_BELOW and not self._plan.fixed:
            return Stop.FUTILE
        return None

    def _is_decided(self, side: Side) -> bool:
        return side.name in self._ends

    def _look_for_stop(self) -> None:
        study, now = self._sides[0].study, self._clock()
        if now - self._looked_for_stop >= LOOK_FOR_STOP_S:
            self._looked_for_stop = now
            grace_s = stop_grace(study)
            if grace_s is not None:
                forget_stop(study)
                self.stop_asking(grace_s)

    def _open_places(self) -> list[tuple[Side, int]]:
        """What is to run, in order: A B, B A, A B ...; with more candidates A1 A2 B, B A2 A1 ..."""
        places = []
        for place in range(self._plan.num_pairs):
            sides = self._sides if place % 2 == 0 else self._sides[::-1]
            places += [(side, place) for side in sides]
        return [
            (side, place)
            for side, place in places
            if place not in side.seeds
            and (side.name, place) not in self._running
            and not self._is_decided(side)
        ]

    # --- runs -------------------------------------------------------------------------------

    def _launch(self) -> None:
        for side, place in self._open_places():
            if len(self._running) >= self._at_once or not self._runner.free_slots(self._demand):
                return
            run = self._prepare(side, place)
            # Runners know trials by number, and two studies may share one.
            if run is None or any(run.number == other.number for other in self._running.values()):
                return
            self._submit(side, place, run)

    def _prepare(self, side: Side, place: int) -> Run | None:
        number = self._left.get((side.name, place))
        if number is None:
            attrs = {CONFIRMS: self._plan.key, "confirms_side": side.name, "confirms_place": place}
            trial = add_seed(side.study, side.of, self._fresh_seed(), attrs)
            self._left[side.name, place] = trial.number
        else:
            found = take_up(side.study, number)
            if found is None:
                return None
            trial = found
        spec, fault = side.book.specify(trial.number, trial.params)
        if fault is not None:
            raise RunnerError(f"trial {spec.key} cannot be run again: {fault.reason}")
        return Run(spec, trial, self._clock())

    def _fresh_seed(self) -> int:
        """One more than any seed of the studies, so that no run of either has seen it."""
        used = [0]
        for side in self._sides:
            used.append(side.book.seed_of(side.of.number))
            used += [t.params.get(SEED_PATH, 0) for t in frozen_trials(side.study)]
        return max(used) + 1

    def _submit(self, side: Side, place: int, run: Run) -> None:
        if run.spec.attempt == 1:
            side.book.open(run.spec, run.trial, [])
        run.submitted_at = self._clock()
        side.book.launch(run.spec)
        self._running[side.name, place] = run
        try:
            self._runner.submit(run.spec, self._demand)
        except RunnerError as error:
            self._conclude((side.name, place), run, Update(RunState.FAILED, error=str(error)))

    def _attend(self, place: tuple[str, int], run: Run) -> None:
        update = self._runner.poll(run.number)
        run.hear(update)
        side = self._side(place)
        if update.events:
            side.book.heard(run.spec, update.events)
        if run.final is not None:
            self._conclude(place, run, run.final)
        elif run.stop_by is not None:
            if self._clock() >= run.stop_by:
                self._cancel(place, run, "did not stop when asked")
        elif is_overdue(run.spec.config.budget, self._clock() - run.submitted_at, self._policy):
            self._cancel(place, run, "cancelled: no result in time")
        elif update.events:
            self._judge(side, run)

    def _judge(self, side: Side, run: Run) -> None:
        verdicts, broken = side.judge.while_running(run.spec, run.steps)
        run.judge(verdicts)
        if broken is not None:
            note_stop(run.trial, broken)
            run.stop_by = self._clock() + self._policy.stop_grace_s
            self._runner.request_stop(run.number, broken.reason)

    def _cancel(self, place: tuple[str, int], run: Run, error: str) -> None:
        self._runner.cancel(run.number)
        self._conclude(place, run, Update(RunState.FAILED, error=error))

    def _conclude(self, place: tuple[str, int], run: Run, update: Update) -> None:
        side, teller = self._side(place), self._teller(place)
        del self._running[place]
        end = teller.ending_of(run, update, self._clock())
        if end is None:
            again = run.again()
            error = update.error or "no reason given"
            side.book.retry(
                again.spec, run.trial, error, run.units(run.lost_s), run.held(self._clock())
            )
            self._submit(side, place[1], again)
            return
        side.book.close(run.spec, run.trial, end)
        self._left.pop(place, None)
        self._note_end(side, place[1], frozen_trials(side.study)[run.number])

    def _put_back(self, of: Callable[[Side], bool] = lambda side: True) -> None:
        """Put seeds in flight into the queue, but tell what finished meanwhile; drop those of
        candidates whose case is decided."""
        for place, run in list(self._running.items()):
            if not of(self._side(place)):
                continue
            self._runner.cancel(run.number)
            del self._running[place]
            side, teller = self._side(place), self._teller(place)
            end = teller.ending_left_behind(run, self._clock())
            if end is not None:
                side.book.close(run.spec, run.trial, end)
                self._note_end(side, place[1], frozen_trials(side.study)[run.number])
            elif self._stop in (None, Stop.REQUESTED) and not self._is_decided(side):
                side.book.note_spent(run.trial, run.units(run.lost_s), run.held(self._clock()))
                requeue(side.study, run.number)
            else:
                self._give_up(side, run, teller)

    def _give_up(self, side: Side, run: Run, teller: Teller) -> None:
        """A seed that nobody needs any more: FAIL says nothing of its configuration."""
        why = self._ends.get(side.name, self._stop)
        assert why is not None
        end = teller.given_up(run, f"ended unfinished: {why.value}", self._clock())
        side.book.close(run.spec, run.trial, end)

    def _side(self, place: tuple[str, int]) -> Side:
        return next(side for side in self._sides if side.name == place[0])

    def _teller(self, place: tuple[str, int]) -> Teller:
        return Teller(self._side(place).judge, self._policy)


def _lease_all(sides: Sequence[Side], clock: Callable[[], float]) -> list[DriverLease]:
    """The leases of all studies that are written to, or none of them."""
    leases: list[DriverLease] = []
    try:
        for study in {side.study.study_name: side.study for side in sides}.values():
            leases.append(DriverLease(study, clock))
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return leases
