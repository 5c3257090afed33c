"""Artifact size before launch: will it be over the cap, and how sure are we?

Forecast: packed code, which is known to the byte, plus the model's bytes by account
(`size_facts.reckoned_bytes`) times a ratio, whose distribution starts from what the public runs
taught (`size_prior`) and follows every artifact measured in the study (`size_model`). How well that
does on the public runs, replayed in time order: docs/artifact_size.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.filters.base import Filter
from service.filters.size_facts import reckoned_bytes, size_facts
from service.filters.size_model import GROUPS, LogRatio, SizeFacts, SizeModel
from service.filters.size_prior import SizePrior, read_prior
from service.trial import TrialSpec, Verdict
from trainer.code import packed_code, packed_modules
from trainer.config import TrainConfig
from trainer.report import TrainResult

DEFAULT_LIMIT = 0.6
"""Over the cap more likely than not, with a margin for good proposals; docs/artifact_size.md has
what others would have caught and refused."""
SCRIPT_SHARE = 0.37
"""Bytes of a script over those of the modules it is made of; 0.30 to 0.43 in the golf recipes."""
MOST_SHARED = 1.4
"""So many times the cap may be forecast where the packer shares out bytes: 6 bits against 4, and
room for what has no fewer."""
OWN_LINE = "study"
"""Line of work of artifacts whose base recipe is not known."""


@dataclass(frozen=True)
class SizeForecast:
    """Distribution of the artifact's bytes: code + reckoned x exp(Student's t)."""

    code: int
    reckoned: float
    """Of the model, by account."""
    log_ratio: LogRatio
    measured: int
    """Artifacts of this study that it was learned from."""

    def quantile(self, probability: float) -> int:
        """Bytes that the artifact stays under with this probability."""
        return round(self.code + self.reckoned * math.exp(self.log_ratio.quantile(probability)))

    def probability_over(self, cap: float) -> float:
        """Chance that the artifact has more bytes than `cap`."""
        if cap <= self.code:
            return 1.0
        return self.log_ratio.above(math.log((cap - self.code) / self.reckoned))

    @property
    def basis(self) -> str:
        """What it rests on, for a person."""
        known = ("the public runs", *(f"others of its {group}" for group in GROUPS[:2]))
        nearest = (*known, "others of its recipe", "others of its shape", "its own settings")
        count = f"{self.measured} artifacts measured here" if self.measured else "nothing measured"
        return f"{count}, nearest known: {nearest[self.log_ratio.situation]}"


class ArtifactSize(Filter):
    """Rejects what is over the cap with more than a given probability.

    Args:
        limit: A proposal is launched unless P(over the cap) is above this.
        recipe: Base recipe of the study, whose artifacts the prior may know; "" = not known.
        prior: What forecasts start from; None = the one that ships.
    """

    name = "artifact_size"

    def __init__(
        self, limit: float = DEFAULT_LIMIT, recipe: str = "", prior: SizePrior | None = None
    ) -> None:
        self._limit = limit
        self._recipe = recipe or OWN_LINE
        self._prior = prior
        self._model: SizeModel | None = None

    def before_launch(self, spec: TrialSpec) -> Verdict | None:
        cap = spec.config.budget.artifact_bytes
        if cap is None or spec.config.source.artifact:  # a file that exists needs no forecast
            return None
        forecast, quantize = self.forecast(spec.config, spec.workers), spec.config.quantize
        over, median = forecast.probability_over(cap), forecast.quantile(0.5)
        reason = (
            f"about {median:,} bytes ({forecast.quantile(0.05):,} to {forecast.quantile(0.95):,}; "
            f"{forecast.basis}) against a cap of {cap:,}: over it with probability {over:.2f}, "
            f"limit {self._limit:g}"
        )
        ok, may_share = over <= self._limit, quantize.method == "gptq"
        if not ok and quantize.allocate != "off" and median <= MOST_SHARED * cap:
            ok, reason = True, f"{reason}; quantize.allocate packs it to fit"
        elif not ok and may_share and median <= MOST_SHARED * cap:
            reason += "; quantize.allocate = rate_distortion would pack it to fit"
        return Verdict(self.name, median, cap, "bytes", ok, reason, predicted=True)

    def forecast(self, config: TrainConfig, workers: int = 8) -> SizeForecast:
        """Distribution of packed code plus packed model."""
        model, reckoned = self._learned(), reckoned_bytes(config)
        log_ratio = model.predict(self._facts(config, workers))
        return SizeForecast(code_bytes(config), reckoned, log_ratio, model.measured)

    def learn(self, config: TrainConfig, result: TrainResult) -> None:
        if result.bytes_model is not None and not config.source.artifact:
            ratio = result.bytes_model / reckoned_bytes(config)
            self._learned().learn(self._facts(config, result.world_size), math.log(ratio))

    def _learned(self) -> SizeModel:
        if self._model is None:
            self._model = (self._prior or read_prior()).model()
        return self._model

    def _facts(self, config: TrainConfig, workers: int) -> SizeFacts:
        return size_facts(config, self._recipe, workers)


def code_bytes(config: TrainConfig) -> int:
    """Bytes of the packed code that the artifact of this run carries; of a script, which takes
    seconds to make, what it is expected to have."""
    if config.compress.code == "script":
        return round(SCRIPT_SHARE * len(packed_modules(config)))
    return len(packed_code(config))
