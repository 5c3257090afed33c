"""Settings of the score."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together


class EvaluateConfig(Settings):
    """How bits per byte are measured at the end."""

    seq_len: PositiveInt = 1024
    """Tokens per evaluation row; the number of scored tokens depends on it."""
    batch_tokens: PositiveInt = 524_288
    """Tokens per forward pass of one worker."""
    prequant: bool = True
    """Also score the weights before quantisation; a diagnostic outside every budget."""
    stride: Annotated[int, Field(ge=0)] = 0
    """Step of sliding windows of seq_len tokens: every window but the first scores only its last
    `stride` targets, so that each has at least seq_len - stride tokens before it. Time grows by
    seq_len / stride. 0 = off: rows side by side, as stride = seq_len."""
    stages: bool = False
    """Also score the artifact in plain rows when the score is made otherwise; a diagnostic outside
    every budget."""
    naive_ttt_epochs: Annotated[int, Field(ge=0)] = 0
    """Passes of SGD over the validation text before it is scored, as #675 did; 0 = off. Illegal on
    the golf tracks."""
    naive_ttt_lr: PositiveFloat = 0.002
    """Learning rate of that SGD."""
    naive_ttt_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of that SGD."""
    ngram_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a hashed n-gram cache in the target's probability (#659 0.15, #675 0.3); 0 = off.
    Illegal on the golf tracks."""
    ngram_order: Annotated[int, Field(ge=2)] = 5
    """Tokens of an n-gram: ngram_order - 1 of context and the target."""
    ngram_min_count: PositiveInt = 3
    """Times that a context must have been seen for the cache to speak."""
    ngram_min_confidence: Fraction = 0.5
    """Share of the target among the context's continuations for the cache to speak."""
    ngram_buckets: PositiveInt = 4_194_304
    """Counters of the cache; n-grams that fall into one are taken for one."""
    ngram_never_lower: bool = False
    """Take the cache only where it helps, max(p, p'), as #675 did."""

    tilt_beta: Annotated[float, Field(ge=0)] = 0.0
    """Nats by which the logit of an n-gram's hint is raised, before the distribution is normalised
    again (#2135 2.625, #1514 2.0); 0 = off."""
    tilt_order: Annotated[int, Field(ge=2)] = 16
    """Tokens of that n-gram: tilt_order - 1 of context, and the hint."""
    tilt_threshold: Fraction = 0.8
    """Least share of the hint among what followed the context before."""

    @model_validator(mode="after")
    def _every_target_is_scored(self) -> Self:
        faults = []
        if self.stride > self.seq_len:
            faults.append(
                f"evaluate.stride = {self.stride} is above evaluate.seq_len = {self.seq_len}: "
                "targets between windows would not be scored; lower it, or 0 for plain rows"
            )
        if self.tilt_beta > 0 and self.ngram_weight > 0:
            faults.append(
                f"evaluate.tilt_beta = {self.tilt_beta:g} and evaluate.ngram_weight = "
                f"{self.ngram_weight:g} are two ways to use n-grams; set one of them to 0"
            )
        return raise_together(self, faults)

    @property
    def method(self) -> str:
        """What the score is made with, in the words of TrainResult.stages."""
        parts = {
            "sliding": self.stride > 0,
            "naive_ttt": self.naive_ttt_epochs > 0,
            "ngram": self.ngram_weight > 0,
            "tilt": self.tilt_beta > 0,
        }
        return "+".join(name for name, is_on in parts.items() if is_on) or "quantized"

    def plain(self) -> EvaluateConfig:
        """The same rows without anything that adds to a plain forward pass: for diagnostics."""
        return self.model_copy(
            update={"stride": 0, "naive_ttt_epochs": 0, "ngram_weight": 0.0, "tilt_beta": 0.0}
        )
