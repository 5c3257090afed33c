"""Which blocks of pr1894 recur, how often, from when on, and how a repeat joins what came before.

The published search went over the start (0.35, 0.4, 0.42 of the budget), two blocks or three, and
the blend, with its initial values; those points come first. Blocks are numbered from 0 of eleven.
The initial values belong to one blend each and do nothing under the others.

Scores are of plain rows: sliding windows cost thirty-two times as much and rank alike.
"""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search_spaces.space import Space

AXES: dict[str, BaseDistribution] = {
    "model.recur_first": IntDistribution(1, 5),
    "model.recur_last": IntDistribution(3, 8),
    "model.recur_visits": IntDistribution(2, 4),
    "model.recur_skips": CategoricalDistribution(["all", "plain"]),
    "schedule.recur_start": FloatDistribution(0.0, 0.7),
    "model.recur_blend": CategoricalDistribution(["off", "alpha", "ab"]),
    "model.recur_alpha_init": FloatDistribution(0.5, 1.2),
    "model.recur_a_init": FloatDistribution(0.5, 1.2),
    "model.recur_b_init": FloatDistribution(-0.2, 0.5),
    "model.recur_lora_rank": CategoricalDistribution([0, 4]),
    "evaluate.stride": CategoricalDistribution([0]),
}
PUBLISHED = {
    "model.recur_first": 3,
    "model.recur_last": 5,
    "model.recur_visits": 3,
    "model.recur_skips": "plain",
    "schedule.recur_start": 0.42,
    "model.recur_blend": "ab",
    "model.recur_alpha_init": 1.0,
    "model.recur_a_init": 1.0,
    "model.recur_b_init": 0.0,
    "model.recur_lora_rank": 0,
}

RECURRENCE = Space(
    name="recurrence",
    recipe="pr1894",
    track="golf-10min-16mb",
    axes=AXES,
    enqueued=(
        PUBLISHED,
        PUBLISHED | {"model.recur_skips": "all"},
        PUBLISHED | {"model.recur_blend": "off"},
        PUBLISHED | {"model.recur_blend": "off", "schedule.recur_start": 0.35},
        PUBLISHED | {"model.recur_blend": "alpha"},
        PUBLISHED | {"model.recur_blend": "alpha", "model.recur_alpha_init": 0.85},
        PUBLISHED | {"model.recur_first": 4, "schedule.recur_start": 0.5},
        PUBLISHED | {"model.recur_blend": "off", "model.recur_lora_rank": 4},
    ),
    description="which blocks recur, how often, from when on, and how repeats blend",
)
