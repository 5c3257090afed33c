"""Which layers of pr1212 see a window, and how wide it is.

Patterns are names of trainer/layer_pattern.py, from two layers to all; each picks other layers of
the twelve. Windows are whole blocks of 128 tokens, because that is what the attention kernel skips
by. The published choice, every second layer and 512, comes first, then the others of its author's
sweep: windows of 256 and 1024, sparse and dense patterns.

The average of weights is off: over 333 steps, as published, it would score the start of a short run
and not its end. Scores are of plain rows; sliding windows cost forty-eight times as much and rank
alike.
"""

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from search_spaces.space import Space

PATTERNS = (
    "spread_2",
    "spread_3",
    "spread_4",
    "even_but_first",
    "even",
    "odd",
    "first_6",
    "last_6",
    "spread_8",
    "all_but_last",
    "all",
)
"""By how many layers they pick, so that a slice over them reads from sparse to dense; of these,
"even_but_first" is the published 2,4,6,8,10."""
WINDOW_AXES: dict[str, BaseDistribution] = {
    "model.window": IntDistribution(128, 2048, step=128),
    "model.window_layers": CategoricalDistribution(PATTERNS),
}
SHORT_RUN_AXES: dict[str, BaseDistribution] = {
    "average.kind": CategoricalDistribution(["none"]),
    "evaluate.stride": CategoricalDistribution([0]),
}
"""Fixed: what a run of minutes on one GPU needs to be judged fairly."""

WINDOW_LAYERS = Space(
    name="window_layers",
    recipe="pr1212",
    track="golf-10min-16mb",
    axes={**WINDOW_AXES, **SHORT_RUN_AXES},
    enqueued=(
        {"model.window": 512, "model.window_layers": "even_but_first"},
        {"model.window": 256, "model.window_layers": "even_but_first"},
        {"model.window": 1024, "model.window_layers": "even_but_first"},
        {"model.window": 512, "model.window_layers": "spread_3"},
        {"model.window": 512, "model.window_layers": "all_but_last"},
    ),
    description="window size, and the layers that have one",
)
