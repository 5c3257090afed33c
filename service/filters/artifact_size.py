"""Artifact size before launch: will it be over the cap, and how sure are we?

Forecast: code + ratio x raw, where raw is what the tensors take at their scheme's bits before
entropy coding, and the ratio's mean and spread are learned from artifacts measured in this study,
per way of quantising and compressing. A prior stands in for the first few: with a row's largest
weight on the largest code, normally distributed weights hold 5.5 of 6 or 7.4 of 8 bits, 0.93 of
raw; the published baseline, 15,863,489 bytes, has 0.93; uniform rows would hold nearly all. Where
floor_by_levels keeps steps coarse, small weights use few codes: the published #1212 has 0.69 and
#675 0.71, and how much it is depends on the size of the weights.

Where the clip is k standard deviations, raw counts the entropy of a normal distribution in such
steps instead, log2(sqrt(2 pi e) c / k) with c the largest code: 3.3 bits at 6 bits and k = 12.85,
whatever the weights. That holds for all widths and clips alike, so what one trial teaches serves
the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

from service.filters.base import Filter
from service.trial import TrialSpec, Verdict
from trainer.account import parameter_table
from trainer.code import packed_code
from trainer.config import QuantizeConfig, TrainConfig
from trainer.config.quantize import SIGMA_CLIPS
from trainer.report import TrainResult

FLOAT_BITS = 16
PRIOR_RATIO = 0.93
PRIOR_SPREAD = 0.05
FLOORED_RATIO = 0.70
FLOORED_SPREAD = 0.08
"""The prior under quantize.floor_by_levels."""
SIGMA_RATIO = 1.02
SIGMA_SPREAD = 0.05
"""The prior where clips are standard deviations: the published #1894, 15,949,492 bytes."""
GAUSSIAN = math.sqrt(2 * math.pi * math.e)
LEAST_BITS = 0.5
"""Of a code, however wide the clip: entropy coders do not go far below."""
PRIOR_WEIGHT = 2.0
"""The prior counts as this many measured artifacts."""
LEAST_SPREAD = 0.002
"""Seeds alone move a compressed size by about this much (median range 7.7 kB of 16 MB, largest
122 kB, over 18 published configurations)."""


@dataclass(frozen=True)
class SizeForecast:
    """Normal distribution of the artifact's bytes."""

    mean: float
    spread: float
    measured: int
    """Artifacts of this kind that the ratio was learned from."""

    def quantile(self, probability: float) -> int:
        """Bytes that the artifact stays under with this probability."""
        return round(NormalDist(self.mean, self.spread).inv_cdf(probability))

    def probability_over(self, cap: float) -> float:
        """Chance that the artifact has more bytes than `cap`."""
        return 1.0 - NormalDist(self.mean, self.spread).cdf(cap)


class ArtifactSize(Filter):
    """Rejects what is over the cap with more than a given probability.

    Args:
        limit: A proposal is launched unless P(over the cap) is above this.
    """

    name = "artifact_size"

    def __init__(self, limit: float = 0.9) -> None:
        self._limit = limit
        self._ratios: dict[tuple[object, ...], _Ratios] = {}

    def before_launch(self, spec: TrialSpec) -> Verdict | None:
        cap = spec.config.budget.artifact_bytes
        if cap is None or spec.config.source.artifact:  # a file that exists needs no forecast
            return None
        forecast = self.forecast(spec.config)
        over = forecast.probability_over(cap)
        learned = f"{forecast.measured} measured artifacts" if forecast.measured else "a prior"
        reason = (
            f"about {forecast.mean:,.0f} bytes ({forecast.quantile(0.05):,} to "
            f"{forecast.quantile(0.95):,}, by {learned}) against a cap of {cap:,}: over it with "
            f"probability {over:.2f}"
        )
        ok = over <= self._limit
        return Verdict(self.name, round(forecast.mean), cap, "bytes", ok, reason, predicted=True)

    def forecast(self, config: TrainConfig) -> SizeForecast:
        """Distribution of packed code plus packed model."""
        ratios = self._ratios.get(_kind(config)) or _prior(config)
        raw = raw_bytes(config)
        mean, spread = ratios.posterior()
        return SizeForecast(code_bytes(config) + mean * raw, spread * raw, len(ratios.seen))

    def learn(self, config: TrainConfig, result: TrainResult) -> None:
        if result.bytes_model is not None and not config.source.artifact:
            ratios = self._ratios.setdefault(_kind(config), _prior(config))
            ratios.seen.append(result.bytes_model / raw_bytes(config))


@dataclass
class _Ratios:
    """Measured model bytes over raw bytes, for one way of coding."""

    prior_mean: float
    prior_spread: float
    seen: list[float] = field(default_factory=list)

    def posterior(self) -> tuple[float, float]:
        """Mean, and standard deviation of the next artifact's ratio.

        Conjugate in form: the prior is PRIOR_WEIGHT observations of its own mean and spread; the
        last factor is the uncertainty of the mean itself.
        """
        weight = PRIOR_WEIGHT + len(self.seen)
        mean = (PRIOR_WEIGHT * self.prior_mean + sum(self.seen)) / weight
        squares = PRIOR_WEIGHT * (self.prior_spread**2 + (self.prior_mean - mean) ** 2)
        squares += sum((ratio - mean) ** 2 for ratio in self.seen)
        spread = math.sqrt(squares / weight * (1 + 1 / weight))
        return mean, max(spread, LEAST_SPREAD)


def _prior(config: TrainConfig) -> _Ratios:
    if config.quantize.clip in SIGMA_CLIPS:
        return _Ratios(SIGMA_RATIO, SIGMA_SPREAD)
    if config.quantize.floor_by_levels:
        return _Ratios(FLOORED_RATIO, FLOORED_SPREAD)
    return _Ratios(PRIOR_RATIO, PRIOR_SPREAD)


def raw_bytes(config: TrainConfig) -> float:
    """Bytes of the stored tensors before entropy coding: small ones as 16-bit floats, the others
    at their scheme's bits with one scale a row."""
    quantize = config.quantize
    bits = 0.0
    for name, shape in parameter_table(config.model).items():
        numel = math.prod(shape)
        if numel <= quantize.keep_float_max_numel:
            bits += FLOAT_BITS * numel
            continue
        coded = _code_bits(quantize, name, quantize.bits_of(name, config.model.num_layers))
        bits += coded * numel + quantize.scale_bits * shape[0]
    return bits / 8


def _code_bits(quantize: QuantizeConfig, name: str, bits: int) -> float:
    """Bits of a code: its width, or less where the clip sets the entropy."""
    if quantize.clip not in SIGMA_CLIPS:
        return bits
    levels = 2 ** (bits - 1) - 1
    sigmas = quantize.for_tensor(name).clip_sigmas
    return min(float(bits), max(LEAST_BITS, math.log2(GAUSSIAN * levels / sigmas)))


def code_bytes(config: TrainConfig) -> int:
    """Bytes of the packed code that the artifact of this run carries."""
    return len(packed_code(config))


def _kind(config: TrainConfig) -> tuple[object, ...]:
    """What must be equal for one artifact's ratio to say something of another's."""
    quantize, compress = config.quantize, config.compress
    widths: tuple[object, ...] = (
        quantize.scheme,
        quantize.embed_bits,
        quantize.matrix_bits,
        quantize.attn_bits,
        quantize.mlp_bits,
        quantize.qk_bits,
        quantize.outer_layers,
        quantize.outer_bits,
        quantize.clip_percentile,
        quantize.scale_floor,
        quantize.floor_by_levels,
    )
    return (
        *(() if quantize.clip in SIGMA_CLIPS else widths),
        quantize.clip,
        quantize.keep_float_max_numel,
        quantize.scale_bits,
        quantize.low_rank,
        compress.codec,
        compress.byte_shuffle,
    )
