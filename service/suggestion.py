"""Ask for a trial again: the parameters it got, out of the study as it was then.

A proposal depends on the sampler's seed, the trial's number and the trials before it. Those that
had ended are in the storage as they were; which ones had not is noted in the trial itself
(service/sampler.py). So the study is set up anew in memory, and asked.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY
from optuna.trial import FrozenTrial, TrialState

from service.errors import UsageError
from service.sampler import ASKED, STARTUP_TRIALS
from service.study import CONFIRMS, frozen_trials, make_sampler

ENQUEUED = "a starting point that was put into the queue"
CONFIRMING = "a fresh seed of a trial, from `caddie confirm`"
RANDOM = "drawn at random, as one of the first"
MODELLED = "proposed by TPE"


@dataclass(frozen=True)
class Suggestion:
    """Where a trial's parameters come from, and what asking again gives."""

    number: int
    origin: str
    """One of the sentences above."""
    params: dict[str, Any]
    """As stored."""
    again: dict[str, Any] | None
    """As asked again; None for what no sampler proposed."""
    seed: int | None
    known: int
    """Trials that the sampler had to learn from."""
    running: int
    """Trials that ran meanwhile, and counted as bad."""

    @property
    def same(self) -> bool | None:
        """Whether asking again gave the same; None where there is nothing to ask."""
        return None if self.again is None else self.again == self.params


def suggest_again(study: optuna.Study, number: int) -> Suggestion:
    """Ask for a stored trial again.

    Raises:
        UsageError: No such trial, or it was asked for before trials noted what there was.
    """
    trials = frozen_trials(study)
    if not 0 <= number < len(trials):
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise UsageError(
            f"study {study.study_name!r} has no trial {number}; its trials are {known}"
        )
    trial = trials[number]
    params = dict(trial.params)
    asked = trial.system_attrs.get(ASKED)
    if asked is None:
        return Suggestion(number, _origin_unasked(study, trial), params, None, None, 0, 0)
    history = [
        _as_it_was(earlier, set(asked["running"]), set(asked["waiting"]))
        for earlier in trials[:number]
    ]
    again = _asked_again(asked["seed"], history, trial, _axes(study))
    num_known = sum(each.state in (TrialState.COMPLETE, TrialState.PRUNED) for each in history)
    return Suggestion(
        number,
        RANDOM if num_known < STARTUP_TRIALS else MODELLED,
        params,
        again,
        asked["seed"],
        num_known,
        len(asked["running"]),
    )


def _origin_unasked(study: optuna.Study, trial: FrozenTrial) -> str:
    if CONFIRMS in trial.user_attrs:
        return CONFIRMING
    if "fixed_params" in trial.system_attrs:
        return ENQUEUED
    raise UsageError(
        f"trial {trial.number} of {study.study_name!r} does not say which trials ran when it was "
        "asked for: an earlier version asked for it; it can be run again with `caddie trial "
        "rerun`, but not asked for again"
    )


def _as_it_was(trial: FrozenTrial, running: set[int], waiting: set[int]) -> FrozenTrial:
    """An earlier trial at that moment: one that had not ended had neither value nor constraint."""
    if trial.number not in running | waiting:
        return trial
    was = copy.copy(trial)
    was.state = TrialState.RUNNING if trial.number in running else TrialState.WAITING
    was._values = was.datetime_complete = None
    was.intermediate_values = {}
    kept = ("fixed_params", _RELATIVE_PARAMS_KEY)
    was._system_attrs = {
        key: value for key, value in trial._system_attrs.items() if key.startswith(kept)
    }
    if trial.number in waiting:
        was._params, was._distributions = {}, {}
    return was


def _asked_again(
    seed: int, history: list[FrozenTrial], trial: FrozenTrial, axes: dict[str, BaseDistribution]
) -> dict[str, Any]:
    """The study as it was, in memory, and one more trial, past the queue: what waits in it is not
    the trial that is asked for."""
    storage = optuna.storages.InMemoryStorage()
    twin = optuna.create_study(storage=storage, sampler=make_sampler(seed))
    for earlier in history:
        storage.create_new_trial(twin._study_id, template_trial=earlier)
    asked = optuna.Trial(twin, storage.create_new_trial(twin._study_id, _template(trial)))
    for path, axis in axes.items():
        asked._suggest(path, axis)
    return asked.params


def _template(trial: FrozenTrial) -> FrozenTrial:
    """A trial that only knows what was fixed when it was put into the queue."""
    fixed = trial.system_attrs.get("fixed_params")
    attrs = {"fixed_params": fixed} if fixed else None
    return optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=attrs)


def _axes(study: optuna.Study) -> dict[str, BaseDistribution]:
    return {path: json_to_distribution(text) for path, text in study.user_attrs["axes"].items()}
