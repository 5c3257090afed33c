"""The sampler proposes what Optuna's TPE proposes, and depends on nothing but the study."""

from __future__ import annotations

import math
import random
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from service.sampler import ASKED, STARTUP_TRIALS, QuickTPE

AXES: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(0.01, 0.16, log=True),
    "decay": FloatDistribution(0.0, 0.2),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "layers": IntDistribution(4, 12),
    "width": IntDistribution(64, 1024, log=True),
    "codec": CategoricalDistribution(["brotli", "zstd", "rans"]),
    "fixed": CategoricalDistribution(["only"]),
}
pytestmark = pytest.mark.filterwarnings("ignore")


class OptunasTPE(TPESampler):
    """As it ships, with a trial's own random numbers and nothing else of ours."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=10)
        self.seed = seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        for rng in (self._rng.rng, self._random_sampler._rng.rng):
            rng.seed([self.seed, trial.number])


def sweep(sampler: Any, num_trials: int, in_flight: int = 4) -> list[FrozenTrial]:
    """Trials of every fate: infeasible, pruned early and late, without a step, failed, waiting."""
    study = optuna.create_study(sampler=sampler)
    chance, running = random.Random(3), []
    study.enqueue_trial({"rate": 0.04})
    for number in range(num_trials):
        running.append(study.ask(AXES))
        if number == 20:
            study.enqueue_trial({"decay": 0.1})
        if len(running) == in_flight:
            end(study, running.pop(chance.randrange(in_flight)), chance)
    return study.get_trials()


def end(study: optuna.Study, trial: optuna.Trial, chance: random.Random) -> None:
    fate = chance.randrange(8)
    trial.set_constraint("bytes", 1.0 * trial.params["layers"] - 11 if fate < 4 else -1.0)
    if fate in (4, 5):
        for step in range(chance.randrange(3)):
            trial.report(math.nan if chance.random() < 0.3 else chance.random(), step)
        study.tell(trial, state=TrialState.PRUNED)
    elif fate == 6:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, (trial.params["rate"] - 0.05) ** 2 + trial.params["decay"])


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_proposals_as_optunas_own_bit_for_bit(seed: int) -> None:
    ours, reference = sweep(QuickTPE(seed), 70), sweep(OptunasTPE(seed), 70)
    assert [trial.params for trial in ours] == [trial.params for trial in reference]
    assert [trial.state for trial in ours] == [trial.state for trial in reference]
    states = {trial.state for trial in ours}
    assert {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING} <= states
    assert any(excess > 0 for trial in ours for excess in trial.constraints.values())


def test_few_complete_trials_are_filled_up_as_optuna_does() -> None:
    """With nothing but pruned and infeasible trials the better ones come from those."""

    def only_pruned(sampler: Any) -> list[dict[str, Any]]:
        study, chance = optuna.create_study(sampler=sampler), random.Random(5)
        for number in range(40):
            trial = study.ask(AXES)
            trial.set_constraint("bytes", chance.random() if number % 3 else -1.0)
            for step in range(number % 4):
                trial.report(chance.random(), step)
            study.tell(trial, state=TrialState.PRUNED)
        return [trial.params for trial in study.get_trials()]

    assert only_pruned(QuickTPE(1)) == only_pruned(OptunasTPE(1))


def test_seeds_and_numbers_have_streams_of_their_own() -> None:
    first, other = sweep(QuickTPE(0), 12), sweep(QuickTPE(1), 12)
    assert first[3].params != other[3].params
    rates = [trial.params["rate"] for trial in first]
    assert len(set(rates)) == len(rates)


def test_a_proposal_does_not_depend_on_what_this_process_asked_before() -> None:
    study = optuna.create_study(sampler=QuickTPE(0))
    chance = random.Random(1)
    for _ in range(STARTUP_TRIALS + 5):
        end(study, study.ask(AXES), chance)
    before = study.get_trials()
    twin = optuna.create_study(sampler=QuickTPE(0))
    for trial in before:
        twin.add_trial(trial)
    assert twin.ask(AXES).params == study.ask(AXES).params


def test_a_trial_notes_who_was_unfinished() -> None:
    trials = sweep(QuickTPE(0), 30)
    assert ASKED not in trials[0].system_attrs or trials[0].params["rate"] == 0.04
    notes = [trial.system_attrs[ASKED] for trial in trials[1:21]]
    assert notes[0]["running"] == [0] and notes[0]["seed"] == 0
    assert all(len(note["running"]) <= 3 for note in notes)
    assert notes[-1]["waiting"] == []
