"""What a sweep tries: a base recipe, its budget, axes, and the points to start from.

A space is data. Axes are Optuna distributions over dotted configuration paths; categorical choices
are plain strings and numbers, because that is all that Optuna's storage keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from trainer.config import TrainConfig
from trainer.recipes import RECIPES


@dataclass(frozen=True)
class Space:
    """A named search space."""

    name: str
    recipe: str
    """Key of trainer.recipes.RECIPES."""
    track: str
    """Name of the track whose budgets bind, unless the sweep is told another."""
    axes: Mapping[str, BaseDistribution]
    """Dotted configuration path -> distribution."""
    enqueued: tuple[dict[str, Any], ...]
    """Points tried before the sampler proposes; a missing axis is proposed."""
    description: str

    def faults(self) -> list[str]:
        """Everything wrong with this space, one line each; empty when it is sound."""
        if self.recipe not in RECIPES:
            return [f"{self.name}: no recipe {self.recipe!r}; there are {', '.join(RECIPES)}"]
        known = RECIPES[self.recipe].build().flat()
        faults = [f"{self.name}: {path} is no setting" for path in self.axes if path not in known]
        faults += [
            f"{self.name}: {path} has the choice {choice!r}; only strings and numbers can vary"
            for path, axis in self.axes.items()
            if isinstance(axis, CategoricalDistribution)
            for choice in axis.choices
            if not isinstance(choice, str | int | float | bool)
        ]
        for place, point in enumerate(self.enqueued):
            faults += [f"{self.name}: point {place}: {fault}" for fault in self._misplaced(point)]
        return faults

    def _misplaced(self, point: Mapping[str, Any]) -> list[str]:
        faults = []
        for path, value in point.items():
            if path not in self.axes:
                faults.append(f"{path} is no axis")
            elif not contains(self.axes[path], value):
                faults.append(f"{path} = {value!r} is outside {self.axes[path]}")
        return faults

    def base(self) -> TrainConfig:
        """The recipe, before any override."""
        return RECIPES[self.recipe].build()


def contains(axis: BaseDistribution, value: Any) -> bool:
    """Whether a distribution can produce this value."""
    try:
        return axis._contains(axis.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def describe_axis(axis: BaseDistribution) -> str:
    """A distribution in words: "2 .. 8", "0.005 .. 4 (log)", "a | b"."""
    if isinstance(axis, CategoricalDistribution):
        return " | ".join(str(choice) for choice in axis.choices)
    fields = axis._asdict()
    words = f"{fields['low']:g} .. {fields['high']:g}"
    if fields.get("log"):
        words += " (log)"
    if fields.get("step") not in (None, 1):
        words += f" step {fields['step']:g}"
    return words
