"""How a trial ended: from a runner's last word, or an earlier driver's traces, to what is told.

Decides only; the trial book writes.
"""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from service.filters.divergence import has_finite_loss, not_finite
from service.filters.memory import out_of_memory
from service.judge import Judge
from service.policies import AfterFailure, Policy, after_failure
from service.run import Run
from service.runners.base import RunState, Update
from service.trial import TrialFolder
from service.trial_book import Ending, stop_verdict
from trainer.report import TrainResult


class Teller:
    """Turns ends of runs into ends of trials.

    Args:
        judge: The filters.
        policy: How often a failure is tried again.
    """

    def __init__(self, judge: Judge, policy: Policy) -> None:
        self._judge = judge
        self._policy = policy

    def ending_of(self, run: Run, update: Update, now: float) -> Ending | None:
        """What to tell of a run that is over; None = nothing yet, try it again."""
        if update.state is RunState.FINISHED:
            assert update.result is not None, "a finished run has a result"
            return self._finished(run, update.result, now)
        if update.state is RunState.OUT_OF_MEMORY:
            run.judge([out_of_memory(update.error or "")])
            return self._end(run, TrialState.PRUNED, now)
        return self._failed(run, update.error or "the run ended without a word", now)

    def ending_left_behind(self, run: Run, now: float) -> Ending | None:
        """What to tell of a trial whose driver or run went away; None = it must run again.

        A finished run is judged as if it had just been heard of; a decision that an earlier driver
        wrote down before it could tell it stands.
        """
        folder = TrialFolder(run.spec.folder)
        result = folder.read_result()
        if result is not None and self._is_an_end(run.trial, result):
            return self._finished(run, result, now)
        decided = [verdict for verdict in folder.read_verdicts() if not verdict.ok]
        stop = stop_verdict(run.trial)
        run.judge([*decided, stop] if stop is not None else decided)
        if stop is not None or decided:
            return self._end(run, TrialState.PRUNED, now)
        return None

    def rejection(self, run: Run, now: float) -> Ending:
        """The end of a proposal that its verdicts reject."""
        return self._end(run, TrialState.PRUNED, now)

    def given_up(self, run: Run, why: str, now: float) -> Ending:
        """The end of a run that nobody waits for any more; says nothing of its configuration."""
        return self._end(run, TrialState.FAIL, now, error=why)

    def _finished(self, run: Run, result: TrainResult, now: float) -> Ending | None:
        if result.status == "stopped":
            return self._stopped(run, result, now)
        # It was done before a stop reached it: what was measured counts, not what was feared.
        run.verdicts = {verdict.name: verdict for verdict in run.verdicts.values() if verdict.ok}
        state, verdicts = self._judge.after_finish(run.spec, result)
        run.judge(verdicts)
        return self._end(run, state, now, result)

    def _stopped(self, run: Run, result: TrainResult | None, now: float) -> Ending | None:
        reason = (result and result.stop_reason) or "stopped without a reason"
        verdict = stop_verdict(run.trial)
        if verdict is None and result is not None and not has_finite_loss(result):
            verdict = not_finite(reason)
        if verdict is None:
            return self._failed(run, f"stopped from outside: {reason}", now)
        run.judge([verdict])
        return self._end(run, TrialState.PRUNED, now, result)

    def _failed(self, run: Run, error: str, now: float) -> Ending | None:
        if stop_verdict(run.trial) is not None:
            return self._stopped(run, None, now)
        if after_failure(run.spec.attempt, self._policy) is AfterFailure.RETRY:
            return None
        return self._end(run, TrialState.FAIL, now, error=error)

    def _is_an_end(self, trial: optuna.Trial, result: TrainResult) -> bool:
        """Whether a result says something of the trial, not of a driver that went away."""
        if result.status == "finished" or stop_verdict(trial) is not None:
            return True
        return not has_finite_loss(result)

    def _end(
        self,
        run: Run,
        state: TrialState,
        now: float,
        result: TrainResult | None = None,
        error: str | None = None,
    ) -> Ending:
        failed, launched = state == TrialState.FAIL, bool(run.submitted_at or result)
        spent_s, saved_s = run.spent_and_saved(state, result)
        return Ending(
            state=state,
            verdicts=tuple(run.verdicts.values()),
            result=result,
            value=result.val_bpb if result and state == TrialState.COMPLETE else None,
            error=error,
            spent_s=run.units(spent_s),
            saved_s=run.units(saved_s),
            timings=run.timings(now),
            ledger={} if failed or not launched else run.ledger(result, now),
            wasted_s=run.held(now) if failed else 0.0,
            held_s=now - run.submitted_at if run.submitted_at else 0.0,
        )
