"""The loop of a sweep: ask, filter, submit, poll, judge, tell. One call of `step` per turn.

Effects happen here and in the trial book, decisions in policies and filters. It knows runners and
trackers only by their interfaces, so it is tested without Ray or MLflow, in simulated time.

What survives a kill at any point: the Optuna storage and the trial folders. A new driver adopts
what it finds RUNNING: a trial with a result is judged and told; any other goes back into the queue
with its number and parameters.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search_spaces import Space
from search_spaces.tracks import TRACKS, Track
from service.driver_storage import batch, forget_cache
from service.errors import RunnerError, StorageError, StudyBusyError
from service.filters import Filter
from service.filters.duplicate import Duplicates
from service.judge import Judge
from service.lease import DriverLease
from service.policies import Ending as SweepEnding
from service.policies import (
    Policy,
    Streak,
    ending,
    hung_error,
    is_hung,
    is_overdue,
    num_to_launch,
    should_report,
)
from service.run import Run
from service.runners.base import Demand, Runner, RunState, Update
from service.spending import Spending
from service.status import RunningTrial, SweepStatus, status_of
from service.steady_clock import SteadyClock
from service.study import (
    CONFIRMS,
    STORAGE_FAULTS,
    forget_stop,
    frozen_trials,
    last_step,
    live_trial,
    requeue,
    stop_grace,
)
from service.teller import Teller
from service.tracking.base import Tracker
from service.trial_book import Ending, TrialBook, note_stop
from trainer.config import BudgetConfig

logger = logging.getLogger(__name__)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
LOOK_FOR_STOP_S = 1.0
"""Between two looks into the storage for a wish to stop."""


class Scheduler:
    """Drives one study. All calls come from one thread.

    Args:
        study: From service.study.open_study.
        space: What is searched.
        runner: Where trials run.
        trackers: Mirrors of the trials.
        filters: From service.filters.default_filters; they learn, so they belong to this sweep.
        demand: Workers of every trial.
        num_trials: The study's COMPLETE and PRUNED trials in all, earlier drivers' included.
        out_dir: Folder of studies; trial folders are out_dir/STUDY/trial-00007.
        track: Budgets in force; None = the space's own.
        overrides: Settings of every trial; they beat the track's.
        demand_of: Workers of a trial by its number, where trials differ; `demand` is then the
            smallest of them.
        max_gpu_s: GPU-seconds that trials of this study may hold, all drivers together; None = no
            limit. No trial is asked for that is expected to pass it.
        policy: Limits and periods.
        provenance: From service.provenance.collect.
        clock: Unix seconds that nobody puts forward or back; None = such a clock. The lease of a
            study, which other hosts read, keeps to the machine's own.

    Raises:
        StudyBusyError: Another live driver works on this study.
        RunnerError: No trial of this demand can ever be placed.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        runner: Runner,
        trackers: Sequence[Tracker],
        filters: Sequence[Filter],
        demand: Demand,
        num_trials: int,
        out_dir: Path,
        *,
        track: Track | None = None,
        overrides: Mapping[str, Any] | None = None,
        demand_of: Callable[[int], Demand] | None = None,
        max_gpu_s: float | None = None,
        policy: Policy | None = None,
        provenance: Mapping[str, Any] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        track = track or TRACKS[space.track]
        _refuse_unless_it_fits(runner, demand)
        self._study = study
        self._space = space
        self._runner = runner
        self._trackers = list(trackers)
        self._judge = Judge(filters)
        self._demand = demand
        self._demand_of = demand_of or (lambda number: demand)
        self._num_trials = num_trials
        self._policy = policy or Policy()
        self._teller = Teller(self._judge, self._policy)
        self._lease = DriverLease(study, clock or time.time)
        clock = clock or SteadyClock()
        self._clock = clock
        self._out_dir = out_dir
        self._spending = Spending(study, runner, demand, track, max_gpu_s, clock)
        self._book = TrialBook(
            study=study,
            base=space.base(),
            recipe=space.recipe,
            overrides={**_budget_overrides(track.budget()), **(overrides or {})},
            study_dir=out_dir.absolute() / study.study_name,
            demand_of=self._demand_of,
            provenance=provenance or {},
            trackers=trackers,
            clock=clock,
        )
        self._running: dict[int, Run] = {}
        self._ready: deque[Run] = deque()
        """Judged fit to launch, waiting for a slot."""
        self._parked: dict[int, tuple[Run, int]] = {}
        """Equal to a trial in flight: (trial, number of that one)."""
        self._duplicates = Duplicates()
        self._told: set[int] = set()
        """Numbers of the COMPLETE and PRUNED trials."""
        self._num_seeds = 0
        """How many of them `caddie confirm` began: they count towards no sweep."""
        self._streak = Streak()
        self._ending: SweepEnding | None = None
        self._stop_by: float | None = None
        self._looked_for_stop = -math.inf
        self._away_since: float | None = None
        """Since when nothing can be written down."""
        self._in_order = False
        """Whether the storage holds nothing RUNNING that this driver does not know."""
        self._remembered: set[int] = set()
        """Trials told by earlier drivers that this one has taken in."""
        self._is_ousted = False
        self._announce()

    def _announce(self) -> None:
        """Say in the study what this sweep is about to do."""
        forget_stop(self._study)
        unit = "GPU-seconds" if self._demand.gpus_per_worker else "worker-seconds"
        for name, value in (("num_trials", self._num_trials), ("unit", unit), ("ending", None)):
            self._study.set_user_attr(name, value)

    def step(self) -> bool:
        """One turn: never waits for a trial. Call it a few times a second.

        Returns:
            True while work remains.

        Raises:
            StorageError: The storage has been away for too long; the study stays resumable.
            StudyBusyError: Another driver took the study over.
        """
        try:
            self._turn()
        except STORAGE_FAULTS as error:
            self._wait(error, f"the storage of study {self._study.study_name!r} does not answer")
            return True
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self._wait(error, f"the disk of {self._out_dir} is full: free some space on it")
            return True
        except StudyBusyError:
            self._is_ousted = True
            raise
        self._away_since = None
        return self._has_work()

    def stop_asking(self, grace_s: float) -> None:
        """Ask for no more trials; what still runs after the grace goes back into the queue."""
        deadline = self._clock() + grace_s
        self._stop_by = deadline if self._stop_by is None else min(deadline, self._stop_by)
        self._ending = self._ending or SweepEnding.REQUESTED

    def status(self) -> SweepStatus:
        """A snapshot for people."""
        return status_of(self._study, running=self._running_rows(), now=self._clock())

    def close(self) -> None:
        """End what runs, leaving it in the queue, and let the next driver in."""
        try:
            if not self._is_ousted:
                self._spending.tick(self._running.values())
                self._interrupt_all()
                self._spending.save(now=True)
                self._study.set_user_attr("ending", self.ending)
                self._lease.release()
        except (*STORAGE_FAULTS, OSError) as error:
            logger.warning("cannot write (%s); the next driver will clean up", error)
        finally:
            self._runner.close()
            for tracker in self._trackers:
                tracker.close()

    @property
    def ending(self) -> str | None:
        """Why the sweep asks for no more trials, in a sentence; None while it does."""
        if self._ending is None:
            return None
        return self._ending.value.format(**vars(self._streak))

    # --- a turn -----------------------------------------------------------------------------

    def _turn(self) -> None:
        self._lease.renew()
        self._spending.tick(self._running.values())
        if not self._in_order:
            self._put_in_order()
        self._spending.save()
        self._look_for_stop()
        for run in list(self._running.values()):
            self._attend(run)
        self._settle_parked()
        self._decide_ending()
        if self._stop_by is not None:
            self._wind_down(self._stop_by)
        self._launch_ready()
        if self._ending is None:
            self._ask_for_more()

    def _has_work(self) -> bool:
        return self._ending is None or bool(self._everything())

    def _decide_ending(self) -> None:
        if self._ending is None:
            self._ending = ending(self._num_told, self._num_trials, self._streak, self._policy)

    def _look_for_stop(self) -> None:
        now = self._clock()
        if now - self._looked_for_stop >= LOOK_FOR_STOP_S:
            self._looked_for_stop = now
            grace_s = stop_grace(self._study)
            if grace_s is not None:
                forget_stop(self._study)
                self.stop_asking(grace_s)

    def _wait(self, error: Exception, what: str) -> None:
        """Nothing can be written down now: the next turn tries again, from what is written."""
        now = self._clock()
        self._in_order = False
        self._lease.expire()
        if self._away_since is None:
            self._away_since = now
            logger.warning("%s (%s); trying again", what, error)
        if now - self._away_since > self._policy.storage_patience_s:
            raise StorageError(
                f"{what}, for {self._policy.storage_patience_s:g} s now; run the same command "
                "again when that is mended, nothing that was told is lost"
            ) from error

    # --- proposals --------------------------------------------------------------------------

    def _ask_for_more(self) -> None:
        for _ in range(self._policy.asks_per_step):
            slots = self._runner.free_slots(self._demand) - len(self._ready)
            wanted = num_to_launch(self._num_trials, self._num_told, len(self._everything()), slots)
            full = len(self._parked) >= self._runner.total_slots(self._demand)
            if wanted == 0 or full or self._ending is not None:
                return
            if not self._spending.has_room(self._everything()):
                self._ending = SweepEnding.BUDGET
                return
            self._ask()
            self._launch_ready()
            self._decide_ending()

    def _ask(self) -> None:
        asked_at = self._clock()
        with batch(self._study):
            trial = self._study.ask(dict(self._space.axes))
        spec, fault = self._book.specify(trial.number, trial.params)
        run = Run(spec, trial, asked_at, last_reported_step=last_step(self._study, trial))
        if fault is None and self._has_owner(run):
            return
        verdicts = [fault] if fault is not None else self._judge.before_launch(spec)
        run.judge(verdicts)
        self._book.open(spec, trial, verdicts)
        if all(verdict.ok for verdict in verdicts):
            self._ready.append(run)
        else:
            self._tell(run, self._teller.rejection(run, self._clock()))

    def _has_owner(self, run: Run) -> bool:
        """Whether the proposal equals an earlier trial; then it is told again or parked."""
        owner = self._duplicates.claim(run.spec.digest, run.number)
        if owner is None:
            return False
        self._book.open(run.spec, run.trial, [])
        self._parked[run.number] = (run, owner)
        self._settle_parked()
        return True

    def _settle_parked(self) -> None:
        for run, owner in list(self._parked.values()):
            if any(other.number == owner for other in self._everything()):
                continue
            earlier = frozen_trials(self._study)[owner]
            digest = run.spec.digest
            if owner in self._told and self._book.folder(owner).verdicts.exists():
                self._tell(run, self._book.copy_end(run.spec, earlier))
            else:
                self._duplicates.release(digest, owner)
                heir = self._duplicates.claim(digest, run.number)
                if heir is not None:
                    self._parked[run.number] = (run, heir)
                    continue
                self._ready.append(run)
            del self._parked[run.number]

    def _launch_ready(self) -> None:
        """Start what fits: the largest gangs first, then the oldest trials. Small gangs fill what
        a large one cannot use; it cannot starve, because `_ready` is short: once it is full of
        large gangs nothing small is asked for, and nodes run empty for them."""
        too_large: set[Demand] = set()
        for run in sorted(self._ready, key=lambda run: -run.spec.workers):
            demand = self._demand_of(run.number)
            if demand in too_large or self._runner.free_slots(demand) <= 0:
                too_large.add(demand)
                continue
            self._ready.remove(run)
            self._spending.tick(self._running.values())
            run.submitted_at = self._clock()
            self._book.launch(run.spec)
            try:
                self._runner.submit(run.spec, demand)
            except RunnerError as error:
                self._conclude(run, Update(RunState.FAILED, error=str(error)))
                return
            self._running[run.number] = run

    # --- runs -------------------------------------------------------------------------------

    def _attend(self, run: Run) -> None:
        if run.final is None:
            update = self._runner.poll(run.number)
            run.hear(update, self._clock())
            if update.events:
                self._book.heard(run.spec, update.events)
                self._report(run)
            if run.final is None:
                self._watch(run, judge=bool(update.events))
                return
        self._conclude(run, run.final)

    def _report(self, run: Run) -> None:
        """An intermediate value now and then, so that the dashboard has curves."""
        since = self._clock() - run.reported_at
        if not run.steps or not should_report(run.num_reported, since, self._policy):
            return
        step, loss = run.steps[-1]["step"], run.steps[-1]["train_loss"]
        if step > run.last_reported_step and math.isfinite(loss):
            run.trial.report(loss, step)
            run.num_reported += 1
            run.reported_at = self._clock()
            run.last_reported_step = step

    def _watch(self, run: Run, judge: bool) -> None:
        """Judge a run that goes on; end it when it must."""
        now = self._clock()
        running_s = now - run.submitted_at
        if run.stop_by is not None:
            if now >= run.stop_by:
                self._cancel(run, "did not stop when asked")
        elif is_overdue(run.spec.config.budget, running_s, self._policy):
            self._cancel(run, f"cancelled: no result {running_s:.0f} s after launch")
        elif self._is_hung(run, running_s):
            silent_s = now - (run.heard_at or run.submitted_at)
            self._cancel(run, hung_error(run.is_training, silent_s))
        elif judge:
            self._judge_running(run)

    def _is_hung(self, run: Run, running_s: float) -> bool:
        if run.steps and not run.is_training:
            return False
        silent_s = self._clock() - run.heard_at
        return is_hung(run.is_training, silent_s, run.longest_gap_s, running_s, self._policy)

    def _judge_running(self, run: Run) -> None:
        verdicts, broken = self._judge.while_running(run.spec, run.steps)
        run.judge(verdicts)
        if broken is not None:
            note_stop(run.trial, broken)
            run.stop_by = self._clock() + self._policy.stop_grace_s
            self._runner.request_stop(run.number, broken.reason)

    def _cancel(self, run: Run, error: str) -> None:
        self._runner.cancel(run.number, hung=True)
        run.final = Update(RunState.FAILED, error=error)
        self._conclude(run, run.final)

    def _conclude(self, run: Run, update: Update) -> None:
        """A run is over: tell the trial, or try it again."""
        if update.state is RunState.FAILED:
            self._book.check_disk()  # a full one fails everybody, and it is no trial's fault
        self._spending.tick(self._running.values())
        end = self._teller.ending_of(run, update, self._clock())
        if end is not None:
            self._tell(run, end)
            return
        again = run.again()
        error = update.error or "no reason given"
        held_s = run.held(self._clock())
        self._book.retry(again.spec, run.trial, error, run.units(run.lost_s), held_s)
        self._running.pop(run.number, None)
        self._ready.append(again)

    def _tell(self, run: Run, end: Ending) -> None:
        verdict = self._book.close(run.spec, run.trial, end)
        self._running.pop(run.number, None)
        self._spending.learn(end)
        self._streak = self._streak.after(verdict)
        if end.state == TrialState.FAIL:
            self._duplicates.release(run.spec.digest, run.number)
        else:
            self._note_told(run.number, run.trial.user_attrs)

    @property
    def _num_told(self) -> int:
        return len(self._told) - self._num_seeds

    def _note_told(self, number: int, attrs: Mapping[str, Any]) -> None:
        if number not in self._told:
            self._told.add(number)
            self._num_seeds += CONFIRMS in attrs

    # --- beginnings and ends ----------------------------------------------------------------

    def _put_in_order(self) -> None:
        """Take over what an earlier driver, or a storage outage, left; count what is told."""
        forget_cache(self._study)
        known = {run.number for run in self._everything()}
        for trial in frozen_trials(self._study):
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._note_told(trial.number, trial.user_attrs)
            if trial.state.is_finished() and trial.number not in self._remembered:
                self._remember(trial)
        for trial in frozen_trials(self._study, TrialState.RUNNING):
            if trial.number not in known:
                spec, _ = self._book.specify(trial.number, trial.params)
                self._leave_or_tell(Run(spec, live_trial(self._study, trial.number)))
        self._in_order = True

    def _remember(self, trial: FrozenTrial) -> None:
        """Take in a trial that an earlier driver told."""
        self._remembered.add(trial.number)
        self._book.catch_up(trial)
        digest = trial.user_attrs.get("digest")
        if digest is not None and trial.state != TrialState.FAIL:
            self._duplicates.claim(digest, trial.number)
        run = self._book.read_run(trial.number)
        if run is not None and trial.state == TrialState.COMPLETE:
            self._judge.learn(*run)

    def _leave_or_tell(self, run: Run) -> None:
        """A trial that nobody runs any more: tell what is known, else put it into the queue."""
        end = self._teller.ending_left_behind(run, self._clock())
        if end is not None:
            self._tell(run, end)
            return
        held_s = run.held(self._clock())
        self._book.note_spent(run.trial, run.units(run.lost_s), held_s)
        requeue(self._study, run.number)
        self._running.pop(run.number, None)

    def _wind_down(self, deadline: float) -> None:
        for run in self._everything():
            if run.number not in self._running:
                requeue(self._study, run.number)
        self._ready.clear()
        self._parked.clear()
        if self._clock() >= deadline:
            self._interrupt_all()

    def _interrupt_all(self) -> None:
        """Put every trial in flight back into the queue, but tell what finished meanwhile."""
        for run in list(self._running.values()):
            if run.final is None:
                self._runner.cancel(run.number)
            self._leave_or_tell(run)
        self._wind_down(math.inf)

    def _everything(self) -> list[Run]:
        parked = (run for run, _ in self._parked.values())
        return [*self._running.values(), *self._ready, *parked]

    def _running_rows(self) -> list[RunningTrial]:
        rows = [run.row() for run in self._running.values()]
        rows += [run.row("retrying") for run in self._ready]
        rows += [run.row("waiting") for run, _ in self._parked.values()]
        return sorted(rows, key=lambda row: row.number)


def _refuse_unless_it_fits(runner: Runner, demand: Demand) -> None:
    if runner.total_slots(demand) < 1:
        raise RunnerError(
            f"a trial of {demand.workers} workers with {demand.cpus_per_worker:g} CPUs and "
            f"{demand.gpus_per_worker:g} GPUs each never fits here; lower --workers-per-trial "
            "or --gpus-per-worker, or add nodes"
        )


def _budget_overrides(budget: BudgetConfig) -> dict[str, Any]:
    """A track says nothing about max_steps."""
    return {
        f"budget.{name}": value
        for name, value in budget.model_dump().items()
        if name != "max_steps"
    }
