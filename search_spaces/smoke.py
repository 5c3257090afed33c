"""Two axes on the recipe tiny: a sweep of minutes on a CPU that shows every way a trial can end."""

from optuna.distributions import FloatDistribution, IntDistribution

from search_spaces.space import Space

SMOKE = Space(
    name="smoke",
    recipe="tiny",
    track="laptop",
    axes={
        "model.num_layers": IntDistribution(2, 8),
        "optim.matrix_lr": FloatDistribution(0.005, 4.0, log=True),
    },
    enqueued=(
        {"model.num_layers": 3, "optim.matrix_lr": 0.04},  # the recipe as it is
        {"model.num_layers": 8, "optim.matrix_lr": 0.04},  # far over the cap: rejected unlaunched
        {"model.num_layers": 3, "optim.matrix_lr": 4.0},  # diverges: stopped while running
    ),
    description="depth and Muon learning rate of a tiny model, under budgets that bind",
)
