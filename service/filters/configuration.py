"""Configuration: a proposal must be a valid TrainConfig that divides over the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.filters.base import Filter
from service.trial import TrialSpec, Verdict
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.mix import sharing_fault

NAME = "configuration"


class Configuration(Filter):
    """Shapes that only go wrong once the number of workers is known."""

    name = NAME

    def before_launch(self, spec: TrialSpec) -> Verdict | None:
        fault = sharing_fault(spec.config.data, spec.workers)
        return None if fault is None else invalid(fault)


def build_config(
    base: TrainConfig, overrides: Mapping[str, Any]
) -> tuple[TrainConfig, Verdict | None]:
    """The proposed configuration; or the base and the verdict that rejects the proposal."""
    try:
        return base.with_overrides(overrides), None
    except ConfigError as error:
        return base, invalid(str(error))


def invalid(faults: str) -> Verdict:
    """The verdict on a configuration with these faults, one a line."""
    lines = faults.splitlines()
    reason = "invalid: " + "; ".join(lines)
    return Verdict(NAME, len(lines), 0, "faults", False, reason, predicted=False)
