"""Published runs as full configurations, one module each, in one visible table."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.recipes.golf_baseline import golf_baseline
from trainer.recipes.tiny import tiny


@dataclass(frozen=True)
class Recipe:
    """A named configuration and where it comes from."""

    name: str
    source: str
    """Paper, pull request or script that it reproduces."""
    techniques: tuple[str, ...]
    """What is switched on, in the field's words."""
    track: str
    """Name of the track whose budgets it was made for."""
    build: Callable[[], TrainConfig]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "tiny",
            "ours: the same code at a size two CPU cores train in seconds",
            ("GQA", "U-Net skips", "Muon", "int6", "byte shuffle", "brotli"),
            "laptop",
            tiny,
        ),
        Recipe(
            "golf_baseline",
            "openai/parameter-golf train_gpt.py (1.2244 on 8xH100)",
            ("GQA", "relu^2", "U-Net skips", "residual mix", "Muon", "warmdown", "int8", "zlib"),
            "golf-10min-16mb",
            golf_baseline,
        ),
    )
}
