"""`caddie recipes`, `spaces`, `tracks`: what there is to choose from."""

from __future__ import annotations

from typing import Any

from service.commands.terminal import JsonFlag, make_table, number, output, print_json


def recipes(as_json: JsonFlag = False) -> None:
    """List the published recipes."""
    from trainer.recipes import RECIPES

    rows = [
        {
            "name": recipe.name,
            "source": recipe.source,
            "techniques": list(recipe.techniques),
            "track": recipe.track,
        }
        for recipe in RECIPES.values()
    ]
    if as_json:
        return print_json(rows)
    table = make_table("recipe", "track", "techniques", "source")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.track, ", ".join(recipe.techniques), recipe.source)
    output().print(table)


def spaces(as_json: JsonFlag = False) -> None:
    """List the search spaces with their axes."""
    from search_spaces import SPACES
    from search_spaces.space import describe_axis

    if as_json:
        rows = [
            {
                "name": space.name,
                "recipe": space.recipe,
                "track": space.track,
                "axes": {path: _distribution(axis) for path, axis in space.axes.items()},
                "enqueued": [dict(start) for start in space.enqueued],
                "description": space.description,
            }
            for space in SPACES.values()
        ]
        return print_json(rows)
    table = make_table("space", "recipe", "track", "axes", "description")
    for space in SPACES.values():
        axes = "\n".join(f"{path}: {describe_axis(axis)}" for path, axis in space.axes.items())
        table.add_row(space.name, space.recipe, space.track, axes, space.description)
    output().print(table)


def tracks(as_json: JsonFlag = False) -> None:
    """List the tracks: budgets and the rule for a record."""
    from search_spaces.tracks import TRACKS
    from service.config import load_settings

    known = {**TRACKS, **load_settings().tracks}
    if as_json:
        return print_json([track.model_dump(mode="json") for track in known.values()])
    numbers = ("bytes", "train s", "eval s", "train tokens", "min steps")
    table = make_table("track", *numbers, "a record is", right=numbers)
    for track in known.values():
        table.add_row(
            track.name,
            number(track.artifact_bytes, 0),
            number(track.train_seconds, 0),
            number(track.eval_seconds, 0),
            number(track.train_tokens, 0),
            number(track.min_steps, 0),
            track.record,
        )
    output().print(table)


def _distribution(axis: Any) -> dict[str, Any]:
    """{"type": "float" or "int", "low", "high", "log", "step"} or {"type": "categorical",
    "choices"}."""
    kind = type(axis).__name__.removesuffix("Distribution").lower()
    names = ("choices",) if kind == "categorical" else ("low", "high", "log", "step")
    values = {name: getattr(axis, name) for name in names}
    return {
        "type": kind,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()},
    }
