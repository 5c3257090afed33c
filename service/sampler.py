"""Optuna's TPE, made to be asked again and to stay quick when a study is large.

Two things differ from `optuna.samplers.TPESampler`, and neither changes what TPE computes:

- The random numbers of a trial come from (seed, trial number) alone, and the trial notes who was
  unfinished when it was asked for: with the study's trials that is all a proposal depends on, so
  that it can be asked again years later (service/suggestion.py).
- Finished trials are kept as rows of one array instead of being read through at every ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import default_gamma
from optuna.trial import FrozenTrial, TrialState

STARTUP_TRIALS = 10
"""Trials proposed at random before TPE models them."""
ASKED = "caddie:asked"
"""System attribute of a proposed trial: the seed, and the numbers of trials unfinished then."""
NUMBER, CLASS, KEY, SECOND_KEY = range(4)
"""First columns of a row; the parameters follow in Optuna's internal form. The keys order trials of
one class, best first."""
COMPLETE, PRUNED, INFEASIBLE = range(3)
"""Classes, in the order in which they fill the better part of the trials."""
FIXED = 4
Rows = NDArray[np.float64]


class ReplayableTPE(TPESampler):
    """TPE over all axes at once; running trials count as bad until told, so that trials asked at
    the same time differ. Constraints need no function: Optuna 5 reads them off the trials.

    Args:
        seed: Of all proposals; a trial's own stream is (seed, number).
    """

    def __init__(self, seed: int) -> None:
        super().__init__(
            seed=seed % 2**32,
            multivariate=True,
            constant_liar=True,
            n_startup_trials=STARTUP_TRIALS,
        )
        self.seed = seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        stream = [self.seed % 2**32, trial.number]
        self._rng.rng.seed(stream)
        self._random_sampler._rng.rng.seed(stream)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        others = study._get_trials(deepcopy=False, use_cache=True)
        asked: Any = {
            "seed": self.seed,
            "running": _numbers(others, TrialState.RUNNING, trial.number),
            "waiting": _numbers(others, TrialState.WAITING, trial.number),
        }
        study._storage.set_trial_system_attr(trial._trial_id, ASKED, asked)
        return super().sample_relative(study, trial, search_space)


class QuickTPE(ReplayableTPE):
    """The same proposals, bit for bit, from arrays. For one study, which is minimised."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._history = _History({})

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study._get_trials(deepcopy=False, use_cache=True)
        if self._history.space != search_space:
            self._history = _History(search_space)
        self._history.learn(trials)
        running = self._history.rows(
            other
            for other in trials
            if other.state == TrialState.RUNNING and other.number != trial.number
        )
        below, above = self._history.split()
        above = _by_number(np.concatenate([above, running]))
        better, worse = (self._estimator(rows, search_space) for rows in (below, above))
        samples = better.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, better, worse))
        return {name: axis.to_external_repr(best[name]) for name, axis in search_space.items()}

    def _estimator(self, rows: Rows, search_space: dict[str, BaseDistribution]) -> _ParzenEstimator:
        known = rows[~np.isnan(rows[:, FIXED:]).any(axis=1)]
        columns = {name: known[:, FIXED + i] for i, name in enumerate(search_space)}
        return self._parzen_estimator_cls(columns, search_space, self._parzen_estimator_parameters)


class _History:
    """The finished trials of a study over one set of axes, as rows by number."""

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.space = dict(space)
        self._known: set[int] = set()
        self._rows = np.empty((0, FIXED + len(space)))

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in those that ended since the last call; what has ended never changes."""
        fresh = [
            trial
            for trial in trials
            if trial.number not in self._known
            and trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        ]
        if fresh:
            self._known.update(trial.number for trial in fresh)
            self._rows = _by_number(np.concatenate([self._rows, self.rows(fresh)]))

    def split(self) -> tuple[Rows, Rows]:
        """The better and the worse trials, as Optuna splits them: complete ones by value, then
        pruned ones by how far they came, then infeasible ones by how far off they are."""
        rows = self._rows
        order = np.lexsort((rows[:, NUMBER], rows[:, SECOND_KEY], rows[:, KEY], rows[:, CLASS]))
        is_below = np.zeros(len(rows), bool)
        is_below[order[: default_gamma(len(rows))]] = True
        return rows[is_below], rows[~is_below]

    def rows(self, trials: Any) -> Rows:
        """One row a trial; parameters that it has not are NaN."""
        found = [[*_rank(trial), *self._internal(trial)] for trial in trials]
        return np.array(found, np.float64).reshape(-1, FIXED + len(self.space))

    def _internal(self, trial: FrozenTrial) -> list[float]:
        params = trial.params
        if not self.space.keys() <= params.keys():
            return [math.nan] * len(self.space)
        return [float(axis.to_internal_repr(params[name])) for name, axis in self.space.items()]


def _rank(trial: FrozenTrial) -> tuple[float, float, float, float]:
    """The first columns of a trial's row; of a running trial only the number counts."""
    excess = sum(value for value in trial.constraints.values() if value > 0)
    if trial.state == TrialState.RUNNING:
        return trial.number, COMPLETE, math.inf, 0.0
    if excess > 0:
        return trial.number, INFEASIBLE, excess, 0.0
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None, "a complete trial has a value"
        return trial.number, COMPLETE, trial.value, 0.0
    if not trial.intermediate_values:
        return trial.number, PRUNED, 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return trial.number, PRUNED, -step, math.inf if math.isnan(value) else value


def _by_number(rows: Rows) -> Rows:
    return rows[np.argsort(rows[:, NUMBER], kind="stable")]


def _numbers(trials: Sequence[FrozenTrial], state: TrialState, own: int) -> list[int]:
    return [trial.number for trial in trials if trial.state == state and trial.number != own]
