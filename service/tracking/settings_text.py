"""Settings in a line of text, the same in MLflow's run names, the live table and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short(value: Any) -> str:
    """A setting's value; four significant digits are enough to tell trials apart."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_settings(settings: Mapping[str, Any]) -> str:
    """ "optim.matrix_lr=0.03123 model.num_layers=4"."""
    return " ".join(f"{path}={short(value)}" for path, value in settings.items())


def describe_by_leaf(settings: Mapping[str, Any]) -> str:
    """As describe_settings, by path, with the group left out where that leaves no doubt."""
    leaves = [path.rsplit(".", 1)[-1] for path in settings]
    named = {}
    for path in sorted(settings):
        leaf = path.rsplit(".", 1)[-1]
        named[leaf if leaves.count(leaf) == 1 else path] = settings[path]
    return describe_settings(named)
