"""Which Muon, what keeps its weights small, and what is averaged at the end.

Starting points: the challenge's baseline; its records of April (equalised rows, high and constant
decay); the last record (Polar Express as well, momentum .97); #1729's tapered decay; Turbo-Muon as
in #1089. The warmdown is a share of the budget, so that the points mean the same on any hardware.
Averages remember about 1 / (1 - decay) steps: in a run of a few hundred, a decay near 1 scores its
beginning, which the axis lets a sweep find out.
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
    "optim.orthogonalization": CategoricalDistribution(
        ["newton_schulz", "polar_express", "gram", "turbo"]
    ),
    "optim.muon_backend_steps": IntDistribution(3, 5),
    "optim.muon_row_normalize": CategoricalDistribution([False, True]),
    "optim.muon_post_norm": CategoricalDistribution(["none", "row", "col", "row_col"]),
    "optim.matrix_lr": FloatDistribution(0.01, 0.08, log=True),
    "optim.muon_momentum": FloatDistribution(0.9, 0.99),
    "optim.adam_beta2": FloatDistribution(0.9, 0.99),
    "optim.weight_decay": FloatDistribution(0.0, 0.2),
    "optim.weight_decay_taper_start": FloatDistribution(0.5, 1.0),
    "schedule.warmdown": CategoricalDistribution(["fraction"]),
    "schedule.warmdown_frac": FloatDistribution(0.1, 0.9),
    "schedule.min_lr": FloatDistribution(0.0, 0.2),
    "average.kind": CategoricalDistribution(["none", "ema", "swa", "lawa"]),
    "average.decay": FloatDistribution(0.9, 0.999),
    "average.start": FloatDistribution(0.0, 0.9),
}
BASELINE: dict[str, Any] = {
    "optim.orthogonalization": "newton_schulz",
    "optim.muon_backend_steps": 5,
    "optim.muon_row_normalize": False,
    "optim.muon_post_norm": "none",
    "optim.matrix_lr": 0.04,
    "optim.muon_momentum": 0.95,
    "optim.adam_beta2": 0.95,
    "optim.weight_decay": 0.0,
    "optim.weight_decay_taper_start": 1.0,
    "schedule.warmdown_frac": 0.1,
    "schedule.min_lr": 0.0,
    "average.kind": "none",
}
EQUALISED: dict[str, Any] = BASELINE | {
    "optim.muon_row_normalize": True,
    "optim.matrix_lr": 0.022,
    "optim.muon_momentum": 0.99,
    "optim.weight_decay": 0.095,
    "schedule.warmdown_frac": 0.72,
}
LAST_RECORD: dict[str, Any] = EQUALISED | {
    "optim.orthogonalization": "polar_express",
    "optim.matrix_lr": 0.026,
    "optim.muon_momentum": 0.97,
    "optim.adam_beta2": 0.99,
    "schedule.warmdown_frac": 0.85,
    "schedule.min_lr": 0.1,
}

OPTIMIZERS = Space(
    name="optimizers",
    recipe="golf_baseline",
    track="golf-10min-16mb",
    axes=AXES,
    enqueued=(
        BASELINE,
        EQUALISED,
        LAST_RECORD,
        LAST_RECORD | {"average.kind": "ema", "average.decay": 0.97, "average.start": 0.0},
        EQUALISED | {"optim.weight_decay_taper_start": 0.7},
        LAST_RECORD | {"optim.orthogonalization": "gram"},
        BASELINE
        | {
            "optim.orthogonalization": "turbo",
            "optim.muon_backend_steps": 4,
            "optim.muon_post_norm": "row_col",
            "optim.matrix_lr": 0.025,
            "optim.muon_momentum": 0.99,
            "optim.weight_decay": 0.04,
        },
    ),
    description="Muon's variant, momentum, decay and its taper, floor of the rate, averaging",
)
