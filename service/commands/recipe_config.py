"""From RECIPE and --set to a checked TrainConfig; shared by every command that takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from service.commands.terminal import named
from trainer.config import TrainConfig, parse_overrides
from trainer.recipes import RECIPES, Recipe

ARTIFACT = "source.artifact"
OF_ARTIFACT = ("model.", "data.", "evaluate.seq_len", "evaluate.batch_tokens")
"""Settings that a packed model brings along, by how their paths begin."""


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
    if overrides.get(ARTIFACT):  # a run may have another working directory
        overrides[ARTIFACT] = str(Path(str(overrides[ARTIFACT])).absolute())
    return overrides


def settings_of_artifact(
    base: TrainConfig, overrides: Mapping[str, object], axes: Collection[str]
) -> dict[str, object]:
    """The model and rows that --set source.artifact was made with, where they are not the recipe's
    and nobody asks for something else: a sweep on it needs no more than the file.

    Raises: ArtifactError when there is no such file.
    """
    if not overrides.get(ARTIFACT):
        return {}
    from trainer.artifact import decode, read

    made, _ = decode(read(Path(str(overrides[ARTIFACT]))))
    return {
        path: value
        for path, value in made.difference(base).items()
        if path.startswith(OF_ARTIFACT) and path not in axes and path != "data.dir"
    }
