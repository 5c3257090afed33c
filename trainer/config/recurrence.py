"""The order in which blocks are visited, and when: what the settings of recurrence mean.

Apart from the settings themselves, because the model, its account and the loop all ask. Loads
without torch.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Place(NamedTuple):
    """One visit of a block on the way from the embedding to the head."""

    layer: int
    visit: int
    """How many visits of the same block come before this one."""


class Phase(NamedTuple):
    """A stretch of training in one order."""

    start: float
    """Share of the budget at which it begins."""
    visits: int


def visit_order(num_layers: int, first: int, last: int, visits: int) -> tuple[Place, ...]:
    """Layers before `first`, then first..last so many times over, then the rest (parameter-golf
    #1394). The first half of the places, rounded down, is the encoder: its outputs are the skips
    that the second half, the decoder, joins in reverse order. With one visit the range is nothing,
    whatever it says."""
    if visits == 1:
        return tuple(Place(layer, 0) for layer in range(num_layers))
    return (
        *(Place(layer, 0) for layer in range(first)),
        *(Place(layer, visit) for visit in range(visits) for layer in range(first, last + 1)),
        *(Place(layer, 0) for layer in range(last + 1, num_layers)),
    )


def count_skips(num_layers: int, first: int, last: int, visits: int) -> int:
    """Pairs of an encoder output and a decoder place that takes it."""
    return len(visit_order(num_layers, first, last, visits)) // 2


def parse_phases(text: str) -> tuple[Phase, ...]:
    """ "2@0.5,3@0.65": one visit at first, two from half of the budget on, three from 0.65 on.

    Raises ValueError with the remedy, but not the name of the setting.
    """
    phases = [Phase(0.0, 1)]
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)@(0?\.\d+|0)", part.strip())
        if match is None:
            raise ValueError(f"{part!r} is no phase; write VISITS@SHARE as in 2@0.5,3@0.65")
        phase = Phase(float(match[2]), int(match[1]))
        if phase.visits <= phases[-1].visits or (len(phases) > 1 and phase.start <= phases[-1][0]):
            raise ValueError(
                f"{part!r} does not come after the phase before it; raise both numbers"
            )
        phases.append(phase)
    return tuple(phases) if phases[1].start > 0 else tuple(phases[1:])


def visits_at(phases: tuple[Phase, ...], progress: float) -> int:
    """Visits of the recurring blocks in a step at this share of the budget."""
    return [phase.visits for phase in phases if phase.start <= progress][-1]
