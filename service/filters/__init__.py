"""One file per constraint, in one visible table. Filters judge in this order."""

from collections.abc import Callable

from service.filters.artifact_size import DEFAULT_LIMIT, ArtifactSize
from service.filters.base import Filter
from service.filters.bytes import Bytes
from service.filters.clock import PhaseClock
from service.filters.configuration import Configuration
from service.filters.divergence import Divergence
from service.filters.legality import Legality
from service.filters.step_time import StepTime

FILTERS: dict[str, Callable[[], Filter]] = {
    "configuration": Configuration,
    "legality": Legality,
    "artifact_size": ArtifactSize,
    "divergence": Divergence,
    "step_time": StepTime,
    "train_seconds": lambda: PhaseClock("train_seconds", ("calibrate", "train")),
    "eval_seconds": lambda: PhaseClock("eval_seconds", ("evaluate",)),
    "bytes": Bytes,
}


def default_filters(
    size_limit: float = DEFAULT_LIMIT, track: str = "", recipe: str = ""
) -> list[Filter]:
    """Every filter, fresh: filters learn, so each sweep has its own.

    Args:
        size_limit: Launch a trial unless its artifact is over the cap with more than this
            probability.
        track: Name of the track in force, for what it forbids; "" forbids nothing.
        recipe: Base recipe of the study, for what is known of its artifacts; "" = nothing.
    """
    made = {
        **FILTERS,
        "artifact_size": lambda: ArtifactSize(size_limit, recipe),
        "legality": lambda: Legality(track),
    }
    return [make() for make in made.values()]


__all__ = ["FILTERS", "Filter", "default_filters"]
