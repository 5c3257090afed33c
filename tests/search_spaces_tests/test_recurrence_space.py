"""The space of recurrence: it starts where the published search ended, and can be sampled."""

import optuna
import pytest

from search_spaces import SPACES
from trainer.errors import ConfigError

SPACE = SPACES["recurrence"]


def test_the_recipe_comes_first() -> None:
    base = SPACE.base().flat()
    assert {path: base[path] for path in SPACE.enqueued[0]} == SPACE.enqueued[0]
    starts = {point["schedule.recur_start"] for point in SPACE.enqueued}
    assert starts == {0.35, 0.42, 0.5}


def test_what_does_not_fit_is_the_range_of_blocks_and_nothing_else() -> None:
    """A sampler may draw a range that ends before it begins: told why, and free of cost."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    refused = 0
    for _ in range(60):
        point = study.ask(dict(SPACE.axes)).params
        if point["model.recur_first"] <= point["model.recur_last"]:
            config = SPACE.base().with_overrides(point)
            assert len(config.model.visit_order(config.model.recur_visits)) > 11
            continue
        refused += 1
        with pytest.raises(ConfigError, match="are no range of blocks"):
            SPACE.base().with_overrides(point)
    assert 0 < refused < 20
