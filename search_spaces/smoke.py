"""Two axes on the recipe tiny: a sweep of minutes on a CPU that shows every way a trial can end.

The learning rate is the embedding's. The matrices' would not do: Muon makes their updates
orthogonal and every block reads normalised inputs, so that 100 in the place of 0.04 costs half a
nat but diverges nowhere. The embedding is also the head, and from about 10 on the logits saturate:
the loss stays above guessing, which the divergence filter sees after some fifteen steps.
"""

from optuna.distributions import FloatDistribution, IntDistribution

from search_spaces.space import Space

SMOKE = Space(
    name="smoke",
    recipe="tiny",
    track="laptop",
    axes={
        "model.num_layers": IntDistribution(2, 8),
        "optim.tied_embed_lr": FloatDistribution(0.005, 50.0, log=True),
    },
    enqueued=(
        {"model.num_layers": 3, "optim.tied_embed_lr": 0.05},  # the recipe as it is
        {"model.num_layers": 8, "optim.tied_embed_lr": 0.05},  # over the cap: never launched
        {"model.num_layers": 3, "optim.tied_embed_lr": 50.0},  # diverges: stopped while running
    ),
    description="depth and embedding learning rate of a tiny model, under budgets that bind",
)
