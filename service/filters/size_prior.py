"""What size forecasts start from: size_prior.json, beside this file.

Made by `python -m benchmarks.size_prior --runs FOLDER` from the public runs; docs/artifact_size.md
says how well it does. `hyper` are the numbers of size_model, `anchors` known log ratios: [groups,
numbers, free of scale, log ratio, spread].
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from service.errors import SweepError
from service.filters.size_model import GROUPS, NUMBERS, SizeFacts, SizeHyper, SizeModel

PRIOR_FILE = Path(__file__).with_name("size_prior.json")
REMEDY = "restore the file of this version of the project"


@dataclass(frozen=True)
class SizePrior:
    """A model's numbers and what it takes as known."""

    hyper: SizeHyper
    anchors: tuple[tuple[SizeFacts, float, float], ...]
    """Facts, log ratio and its spread."""
    fitted_on: str

    def model(self) -> SizeModel:
        """A fresh model that knows the anchors."""
        model = SizeModel(self.hyper)
        for facts, log_ratio, spread in self.anchors:
            model.assume(facts, log_ratio, spread)
        return model

    def to_json(self) -> str:
        """One anchor a line."""
        lines = ",\n".join(
            json.dumps([facts.groups, facts.numbers, facts.scale_free, ratio, spread])
            for facts, ratio, spread in self.anchors
        )
        head = json.dumps({"fitted_on": self.fitted_on, "hyper": asdict(self.hyper)}, indent=1)
        return f'{head[:-2]},\n "anchors": [\n{lines}\n]}}\n'


@lru_cache(maxsize=4)
def read_prior(path: Path = PRIOR_FILE) -> SizePrior:
    """The prior as shipped.

    Raises:
        SweepError: The file is missing or is not one; names it.
    """
    try:
        document = json.loads(path.read_text())
        hyper = {k: _tuples(v) for k, v in document["hyper"].items()}
        anchors = tuple(_anchor(*row) for row in document["anchors"])
        return SizePrior(SizeHyper(**hyper), anchors, document["fitted_on"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{path}: no prior of artifact sizes ({error}); {REMEDY}") from error


def _anchor(
    groups: list[str | None], numbers: list[float | None], free: bool, ratio: float, spread: float
) -> tuple[SizeFacts, float, float]:
    if (len(groups), len(numbers)) != (len(GROUPS), len(NUMBERS)):
        raise ValueError(f"{len(groups)} groups and {len(numbers)} numbers in an anchor")
    return SizeFacts(tuple(groups), tuple(numbers), free), float(ratio), float(spread)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
