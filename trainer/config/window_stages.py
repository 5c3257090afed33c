"""Windows that grow in the course of a run: the text form of model.window_stages.

"256:768,768:1792@0.3,1280:2048@0.6" is windows of 256 tokens in the short layers and of 768 in the
long ones, from 0.3 of the budget on 768 and 1792, from 0.6 on 1280 and 2048 (slowrun, its two-hour
track). Evaluation is in the last stage. Where the long window grows, positions are stretched by
YaRN (https://arxiv.org/abs/2309.00071) from one stage to the next. Loads without torch.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.config.model import ModelConfig

STAGE = re.compile(r"(\d+):(\d+)(?:@(0?\.\d+))?")
FASTEST = 32
"""Turns within the old window from which a frequency is kept; below one it is stretched in full."""


class WindowStage(NamedTuple):
    """A stretch of training under one pair of windows."""

    short: int
    """Tokens before itself that a token sees in the layers of model.window_layers."""
    long: int
    """The same in the other layers."""
    start: float
    """Share of the budget at which it begins."""


def parse_window_stages(text: str) -> tuple[WindowStage, ...]:
    """The stages of a text, none of "". ValueError with the remedy, but not the name of the
    setting."""
    stages: list[WindowStage] = []
    for part in text.split(",") if text else ():
        match = STAGE.fullmatch(part.strip())
        if match is None or bool(match[3]) != bool(stages):
            raise ValueError(
                f"{part!r} is no stage; write SHORT:LONG for the first and SHORT:LONG@SHARE for "
                "the others, as in 256:768,768:1792@0.3"
            )
        stage = WindowStage(int(match[1]), int(match[2]), float(match[3] or 0))
        last = stages[-1] if stages else WindowStage(1, 1, -1.0)
        if not (0 < stage.short <= stage.long and stage.long >= last.long):
            raise ValueError(f"{part!r}: SHORT must not be above LONG, nor LONG shrink")
        if stage.start <= last.start:
            raise ValueError(f"{part!r} does not begin after the stage before it; raise its share")
        stages.append(stage)
    return tuple(stages)


def window_stage_at(stages: tuple[WindowStage, ...], progress: float) -> int:
    """Index of the stage at a share of the budget; 0 without stages."""
    return max(0, sum(stage.start <= progress for stage in stages) - 1)


def stretched(frequencies: list[float], stages: tuple[WindowStage, ...]) -> list[float]:
    """Radians per token after the last of these stages. A frequency f that turns r = o f / 2 pi
    times within the old long window o becomes f (o / n + g (1 - o / n)), where g rises from 0 at
    one turn to 1 at FASTEST."""
    for before, after in itertools.pairwise(stages):
        ratio = before.long / after.long
        turns = (before.long * f / (2 * math.pi) for f in frequencies)
        kept = [min(1.0, max(0.0, (turn - 1) / (FASTEST - 1))) for turn in turns]
        frequencies = [
            f * (ratio + g * (1 - ratio)) for f, g in zip(frequencies, kept, strict=True)
        ]
    return frequencies


def score_scale(stages: tuple[WindowStage, ...]) -> float:
    """Factor on attention's scores after the last of these stages: 1 + 0.2 ln(n / o) for each."""
    return math.prod(
        1 + 0.2 * math.log(after.long / before.long) for before, after in itertools.pairwise(stages)
    )


def faults_of_window_stages(model: ModelConfig) -> list[str]:
    """Broken rules, each with dotted path, value and remedy."""
    written = f"model.window_stages = {model.window_stages!r}"
    try:
        stages = parse_window_stages(model.window_stages)
    except ValueError as error:
        return [f"model.window_stages: {error}"]
    if not stages:
        return []
    faults = []
    if model.window != stages[-1].short:
        faults.append(
            f"{written} ends with short windows of {stages[-1].short}, but evaluation has "
            f"model.window = {model.window}; make them equal"
        )
    switches: dict[str, tuple[object, object]] = {
        "iha": ("off" if model.iha == "fused" else model.iha, "off"),
        "diff_attention": (model.diff_attention, "off"),
        "num_loops": (model.num_loops, 1),
        "half_rope": (model.half_rope, False),
        "rope_ntk_len": (model.rope_ntk_len, 0),
    }
    faults += [
        f"{written} is not defined for model.{name} = {value!r}; set model.{name} = {off!r}, or "
        'model.window_stages = ""'
        for name, (value, off) in switches.items()
        if value != off
    ]
    return faults
