"""Settings of QAT-lite: late in the run, chosen matrices are drawn towards their codes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together


class QatLiteConfig(Settings):
    """A penalty on the distance between weights and what they are rounded to; forward passes see
    the weights as they are. Defaults are those of parameter-golf #1894, but for kind and
    reduction."""

    kind: Literal["none", "squared", "clip", "hybrid", "pull"] = "none"
    """"squared": (W - Q)^2 joins the loss. "clip": the square of what lies beyond the clip.
    "hybrid": half of each. "pull": weights themselves go towards Q after a step, apart from the
    optimiser."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the weights of a matrix, for penalties. "mean" is what was published: its gradient is
    five orders below that of the loss, and does nothing."""
    strength: PositiveFloat = 0.02
    """Factor on the penalty, or the share of the way to Q that a pull goes, when fully ramped."""
    bits: Annotated[int, Field(ge=2, le=8)] = 6
    """Of the codes; should be those of the artifact."""
    clip_sigmas: PositiveFloat = 12.85
    """Clip in standard deviations of a row; should be that of the artifact."""
    targets: Literal["qk", "qk_out", "attn", "all"] = "qk"
    """Matrices of the blocks: queries and keys; with attention's output; all of attention; all."""
    first_layer: Annotated[int, Field(ge=0)] = 7
    """Blocks from this one on, counted from 0."""
    depth_power: Annotated[float, Field(ge=0)] = 0.0
    """Block l of L weighs ((l + 1) / L)^depth_power; 0 = all alike."""
    start: Fraction = 0.55
    """Share of the budget at which it begins; from there the strength rises linearly to the end."""
    every: PositiveInt = 4
    """Steps from one at which it acts to the next."""

    @model_validator(mode="after")
    def _it_acts_and_does_not_overshoot(self) -> Self:
        faults = []
        if self.kind != "none" and self.start == 1:
            faults.append(
                f'qat_lite.kind = "{self.kind}" would never begin at qat_lite.start = 1; lower it, '
                'or set qat_lite.kind = "none"'
            )
        if self.kind == "pull" and self.strength > 1:
            faults.append(
                f'qat_lite.strength = {self.strength:g} under qat_lite.kind = "pull" would carry '
                "weights past their codes; set at most 1"
            )
        return raise_together(self, faults)
