"""Interleaved head attention on a model of a CPU's size: which form, where, and from what start.

The published comparison changed five things at once. Here each is an axis of its own: heads that
mix, windows a quarter as long, positions twice as far apart, long layers P^2 times as dear, and a
start at which half of the keys are null. The first points take them apart: plain; plain with the
short windows that interleaving has; fused; as published; the same with one departure each; and the
start that is plain attention. Axes of one form do nothing under the others, and a point that names
no layer or leaves no window is refused before launch, with the reason.

The recipe is tiny, and windows are in its units: its rows have 128 tokens. Keys and values have as
many heads as queries, as they were published. On a larger recipe the same points hold with a window
of its own (slowrun: 1024 of 2048).
"""

from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search_spaces.space import Space

AXES: dict[str, BaseDistribution] = {
    "model.iha": CategoricalDistribution(["off", "fused", "interleaved"]),
    "model.iha_layers": CategoricalDistribution(["all", "long", "short", "odd"]),
    "model.iha_pseudo_heads": IntDistribution(1, 4),
    "model.iha_windows": CategoricalDistribution(["flops", "tokens"]),
    "model.iha_positions": CategoricalDistribution(["pseudo", "token"]),
    "model.iha_init": CategoricalDistribution(["first", "replicated"]),
    "model.iha_mask": CategoricalDistribution(["causal", "block"]),
    "model.iha_collapse": CategoricalDistribution(["own", "all"]),
    "optim.iha_lr": FloatDistribution(0.002, 0.1, log=True),
    "model.window": IntDistribution(16, 64, step=16),
    "model.window_layers": CategoricalDistribution(["SSSL"]),
    "model.num_kv_heads": CategoricalDistribution([4]),
}
PLAIN: dict[str, Any] = {
    "model.iha": "off",
    "model.iha_layers": "all",
    "model.iha_pseudo_heads": 2,
    "model.iha_windows": "flops",
    "model.iha_positions": "pseudo",
    "model.iha_init": "first",
    "model.iha_mask": "causal",
    "model.iha_collapse": "own",
    "optim.iha_lr": 0.02,
    "model.window": 64,
    "model.window_layers": "SSSL",
    "model.num_kv_heads": 4,
}
PUBLISHED = PLAIN | {"model.iha": "interleaved"}

IHA = Space(
    name="iha",
    recipe="tiny",
    track="laptop",
    axes=AXES,
    enqueued=(
        PLAIN,
        PLAIN | {"model.window": 16},
        PLAIN | {"model.iha": "fused"},
        PUBLISHED,
        PUBLISHED | {"model.iha_windows": "tokens"},
        PUBLISHED | {"model.iha_positions": "token"},
        PUBLISHED | {"model.iha_init": "replicated"},
        PUBLISHED
        | {
            "model.iha_windows": "tokens",
            "model.iha_positions": "token",
            "model.iha_init": "replicated",
            "model.iha_mask": "block",
        },
        PUBLISHED | {"model.iha_pseudo_heads": 1, "model.window": 16},
        PUBLISHED | {"model.iha_layers": "short"},
        PUBLISHED | {"model.iha_collapse": "all", "model.iha_layers": "short"},
    ),
    description="how heads mix, where, with which windows and positions, and from what start",
)
