"""From RECIPE and --set to a checked TrainConfig; shared by every command that takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from service.commands.terminal import named
from trainer.config import TrainConfig, parse_overrides
from trainer.recipes import RECIPES, Recipe

CHECKPOINT = "source.checkpoint"
NOT_OF_WEIGHTS = ("runtime", "source")
"""Groups of settings that say nothing about trained weights."""
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
    for source in (CHECKPOINT, ARTIFACT):  # a run may have another working directory
        if overrides.get(source):
            overrides[source] = str(Path(str(overrides[source])).absolute())
    return overrides


def settings_of_source(
    base: TrainConfig, overrides: Mapping[str, object], axes: Collection[str]
) -> dict[str, object]:
    """What the file of --set source.checkpoint or source.artifact was made with, where that is not
    the recipe's and nobody asks for something else: a sweep on it needs no more than the file.

    Raises: ArtifactError when there is no such file.
    """
    if overrides.get(CHECKPOINT):
        from trainer.checkpoint import read_config

        made = read_config(Path(str(overrides[CHECKPOINT])))
    elif overrides.get(ARTIFACT):
        from trainer.artifact import decode, read

        made, _ = decode(read(Path(str(overrides[ARTIFACT]))))
    else:
        return {}
    return {
        path: value
        for path, value in made.difference(base).items()
        if path not in axes and path != "data.dir" and _comes_along(path, overrides)
    }


def _comes_along(path: str, overrides: Mapping[str, object]) -> bool:
    if overrides.get(CHECKPOINT):
        return path.split(".")[0] not in NOT_OF_WEIGHTS
    return path.startswith(OF_ARTIFACT)
