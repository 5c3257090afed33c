"""Every space is sound, and an unsound one says why."""

from dataclasses import replace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces import SPACES
from search_spaces.space import contains, describe_axis
from search_spaces.tracks import TRACKS, Track
from trainer.recipes import RECIPES


@pytest.mark.parametrize("name", SPACES)
def test_space_is_sound(name: str) -> None:
    space = SPACES[name]
    assert space.faults() == []
    assert space.name == name
    assert space.track in TRACKS
    for point in space.enqueued:
        config = space.base().with_overrides(point)
        assert {path: config.flat()[path] for path in point} == point


def test_faults_name_unknown_path_foreign_point_and_unstorable_choice() -> None:
    broken = replace(
        SPACES["smoke"],
        axes={
            "optim.matrix_lr": FloatDistribution(0.01, 0.1),
            "optim.matrx_lr": FloatDistribution(0.01, 0.1),
            "model.rope_base": CategoricalDistribution([None, 1e4]),
        },
        enqueued=({"optim.matrix_lr": 0.5}, {"model.num_heads": 4}, {"optim.matrix_lr": "high"}),
    )
    assert broken.faults() == [
        "smoke: optim.matrx_lr is no setting",
        "smoke: model.rope_base has the choice None; only strings and numbers can vary",
        "smoke: point 0: optim.matrix_lr = 0.5 is outside "
        "FloatDistribution(high=0.1, log=False, low=0.01, step=None)",
        "smoke: point 1: model.num_heads is no axis",
        "smoke: point 2: optim.matrix_lr = 'high' is outside "
        "FloatDistribution(high=0.1, log=False, low=0.01, step=None)",
    ]


def test_unknown_recipe_is_named() -> None:
    fault = replace(SPACES["smoke"], recipe="tinny").faults()
    assert fault == [f"smoke: no recipe 'tinny'; there are {', '.join(RECIPES)}"]


def test_contains_respects_integers_and_bounds() -> None:
    assert contains(IntDistribution(2, 8), 8)
    assert not contains(IntDistribution(2, 8), 9)
    assert contains(CategoricalDistribution(["a"]), "a")
    assert not contains(CategoricalDistribution(["a"]), "b")


def test_describe_axis() -> None:
    assert describe_axis(IntDistribution(2, 8)) == "2 .. 8"
    assert describe_axis(FloatDistribution(0.005, 4, log=True)) == "0.005 .. 4 (log)"
    assert describe_axis(FloatDistribution(0, 1, step=0.25)) == "0 .. 1 step 0.25"
    assert describe_axis(CategoricalDistribution(["S", "L"])) == "S | L"


def test_budget_of_a_track_reaches_the_run() -> None:
    track = Track(name="mine", artifact_bytes=5, train_seconds=2.0, min_steps=7)
    budget = track.budget()
    assert (budget.artifact_bytes, budget.train_seconds) == (5, 2.0)
    assert (budget.eval_seconds, budget.min_steps) == (None, 7)


def test_golf_budgets_are_the_published_ones() -> None:
    golf = TRACKS["golf-10min-16mb"]
    assert (golf.artifact_bytes, golf.train_seconds, golf.eval_seconds) == (16_000_000, 600, 600)
