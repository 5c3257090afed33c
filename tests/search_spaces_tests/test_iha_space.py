"""The space of interleaved heads: its points differ in one thing each, and can be sampled."""

import optuna
import pytest

from search_spaces import SPACES
from trainer.account import flops_per_token
from trainer.errors import ConfigError

SPACE = SPACES["iha"]


def test_points_take_the_confounds_apart() -> None:
    published = SPACE.enqueued[3]
    departures = [
        {path for path, value in point.items() if value != published[path]}
        for point in SPACE.enqueued
    ]
    assert departures[0] == departures[2] == {"model.iha"}
    singles = [names for names in departures[4:] if len(names) == 1]
    assert sorted(next(iter(names)) for names in singles) == [
        "model.iha_init",
        "model.iha_layers",
        "model.iha_positions",
        "model.iha_windows",
    ]


def test_short_windows_alone_are_those_that_interleaving_has() -> None:
    """In tokens: 64 with P = 2 reach as far back as 16 without."""
    short, published = (SPACE.base().with_overrides(SPACE.enqueued[i]).model for i in (1, 3))
    assert short.window_of(0) == 16
    assert published.pseudo_window_of(0) == 16 * published.iha_pseudo_heads


def test_a_short_layer_costs_what_the_plain_one_does_and_a_long_one_more() -> None:
    plain, published = (SPACE.base().with_overrides(SPACE.enqueued[i]).model for i in (0, 3))
    assert flops_per_token(plain, 128) < flops_per_token(published, 128)


def test_what_does_not_fit_is_told_why_and_everything_else_is_built() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    built = 0
    for _ in range(60):
        point = study.ask(dict(SPACE.axes)).params
        narrow = point["model.window"] // point["model.iha_pseudo_heads"]
        if point["model.iha_mask"] == "block":
            narrow //= point["model.iha_pseudo_heads"]
        if narrow or point["model.iha_windows"] == "tokens":
            SPACE.base().with_overrides(point)
            built += 1
            continue
        with pytest.raises(ConfigError, match="leaves no window"):
            SPACE.base().with_overrides(point)
    assert built > 50
