"""From RECIPE and --set to a checked TrainConfig; shared by every command that takes them."""

from __future__ import annotations

from service.commands.terminal import named
from trainer.config import TrainConfig, parse_overrides
from trainer.recipes import RECIPES, Recipe


def recipe_named(name: str) -> Recipe:
    """The recipe; UsageError with the nearest names."""
    return named("recipe", name, RECIPES)


def configured(
    recipe: str, sets: list[str] | None, seed: int | None = None
) -> tuple[TrainConfig, dict[str, object]]:
    """The recipe with its overrides, and the overrides themselves.

    Raises: UsageError for an unknown recipe, ConfigError with every fault of the settings.
    """
    base = recipe_named(recipe).build()
    overrides = settings(base, sets)
    if seed is not None:
        overrides["runtime.seed"] = seed
    return base.with_overrides(overrides), overrides


def settings(base: TrainConfig, sets: list[str] | None) -> dict[str, object]:
    """--set pairs as overrides; what a text setting gets stays text, even if it looks like JSON."""
    pairs = sets or []
    overrides = parse_overrides(pairs)
    flat = base.flat()
    for pair in pairs:
        path, _, text = pair.partition("=")
        if isinstance(flat.get(path), str):
            overrides[path] = text
        elif text.lower() == "none":
            overrides[path] = None
    return overrides
