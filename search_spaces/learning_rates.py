"""Learning rates and what they trade against, on the challenge's baseline.

Ranges span a factor of about four to each side of the baseline, whose settings come first. The
warmdown is given as a fraction of the budget, so that the axis means the same on any hardware.
"""

from optuna.distributions import CategoricalDistribution, FloatDistribution

from search_spaces.space import Space

LEARNING_RATES = Space(
    name="learning_rates",
    recipe="golf_baseline",
    track="golf-10min-16mb",
    axes={
        "optim.matrix_lr": FloatDistribution(0.01, 0.16, log=True),
        "optim.scalar_lr": FloatDistribution(0.01, 0.16, log=True),
        "optim.tied_embed_lr": FloatDistribution(0.0125, 0.2, log=True),
        "optim.muon_momentum": FloatDistribution(0.85, 0.99),
        "optim.weight_decay": FloatDistribution(0.0, 0.2),
        "schedule.warmdown": CategoricalDistribution(["fraction"]),
        "schedule.warmdown_frac": FloatDistribution(0.05, 0.9),
    },
    enqueued=(
        {
            "optim.matrix_lr": 0.04,
            "optim.scalar_lr": 0.04,
            "optim.tied_embed_lr": 0.05,
            "optim.muon_momentum": 0.95,
            "optim.weight_decay": 0.0,
            "schedule.warmdown_frac": 0.1,
        },
        {
            "optim.matrix_lr": 0.02,
            "optim.scalar_lr": 0.02,
            "optim.tied_embed_lr": 0.03,
            "optim.muon_momentum": 0.97,
            "optim.weight_decay": 0.0,
            "schedule.warmdown_frac": 0.5,
        },
    ),
    description="matrix, scalar and embedding learning rates, momentum, decay, warmdown",
)
