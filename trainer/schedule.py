"""Learning-rate multiplier, momentum and weight decay at a point of the run.

Schedules follow `progress`, the share of the budget that is spent (0 at the start, 1 at the cap),
so that a faster machine does not see a different schedule. Plain float arithmetic, no torch.
"""

from __future__ import annotations

import math

from trainer.config import OptimConfig, ScheduleConfig
from trainer.config.optim import parse_points, parse_span


def lr_multiplier(config: ScheduleConfig, step: int, progress: float) -> float:
    """Multiplier of every learning rate for the step that is about to run, in [min_lr, 1].

    With warmdown "fraction" f: 1 until progress 1 - f, then linear to 0 at progress 1. With
    "steps" W: the share of the budget that W steps take at the present mean step time, as the
    challenge's baseline does: f = W * progress / step. On a machine so slow that W steps are the
    whole budget, that one decays from the first step on. warmdown_power bends the fall.

    Within a cycle: floor + (peak - floor) (1 + cos(pi x)) / 2 at x of its length, where peak is
    the rule above at the cycle's begin, or the floor where that is lower (slowrun, its SWA phase).
    """
    cycle = cycle_at(config, progress)
    if cycle is None:
        return _warmed_down(config, step, progress)
    begin, done = cycle
    floor = config.cycle_min_lr
    # A warmdown in steps needs the step at which the cycle began: the same pace throughout.
    first_step = round(step * begin / progress) if progress else 0
    peak = max(floor, _warmed_down(config, first_step, begin))
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def cycle_at(config: ScheduleConfig, progress: float) -> tuple[float, float] | None:
    """Share of the budget at which the present cycle began, and the share of it that is done; None
    before the first."""
    first = 1.0 - config.cycles * config.cycle_share
    if not config.cycles or progress < first - 1e-12:
        return None
    index = min(config.cycles - 1, int((progress - first) / config.cycle_share + 1e-9))
    begin = first + index * config.cycle_share
    return begin, min(1.0, max(0.0, (progress - begin) / config.cycle_share))


def cycles_done(config: ScheduleConfig, progress: float) -> int:
    """Cycles that have ended by a share of the budget."""
    cycle = cycle_at(config, progress)
    if cycle is None:
        return 0
    first = 1.0 - config.cycles * config.cycle_share
    return round((cycle[0] - first) / config.cycle_share) + (cycle[1] == 1.0)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What a step of a rank draws dropout and stochastic depth from, so that a resumed run draws
    the same again."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


def decay_multiplier(config: ScheduleConfig, progress: float) -> float:
    """Factor on every weight decay at a share of the budget (slowrun, its decay sawtooth)."""
    span, cycle = parse_span(config.cycle_decay), cycle_at(config, progress)
    if span is not None and cycle is not None:
        return span[0] + (span[1] - span[0]) * cycle[1]
    points = parse_points(config.decay_points)
    if not points:
        return 1.0
    after = next((place for place, point in enumerate(points) if progress < point[0]), None)
    if after is None or after == 0:
        return points[-1 if after is None else 0][1]
    (left, low), (right, high) = points[after - 1], points[after]
    return low + (high - low) * (progress - left) / (right - left)


def _warmed_down(config: ScheduleConfig, step: int, progress: float) -> float:
    """The multiplier without cycles."""
    if config.warmdown == "fraction":
        share = config.warmdown_frac
    elif step == 0:
        return 1.0
    else:
        share = config.warmdown_steps * progress / step
    if share <= 0:
        return 1.0
    left: float = min(1.0, max(0.0, 1.0 - progress) / share)
    return max(config.min_lr, float(left**config.warmdown_power))


def muon_momentum(config: OptimConfig, step: int, progress: float = 0.0) -> float:
    """Momentum of Muon for the step that is about to run; linear warm-up over a share of the
    budget where muon_momentum_warmup_frac is set, else over steps."""
    if config.muon_momentum_warmup_frac > 0:
        share = min(1.0, progress / config.muon_momentum_warmup_frac)
    elif config.muon_momentum_warmup_steps > 0:
        share = min(1.0, step / config.muon_momentum_warmup_steps)
    else:
        return config.muon_momentum
    start = config.muon_momentum_warmup_start
    return start + share * (config.muon_momentum - start)


def extra_weight_decay(config: OptimConfig, lr_mult: float, progress: float = 0.0) -> float:
    """What ramp and taper add to the matrices' weight decay at a learning-rate multiplier and a
    share of the budget.

    parameter-golf #309 and #675: wd = base + ramp (1 - multiplier). Decay acts times the scheduled
    rate, so what a step takes away, lr wd, peaks on the way down and ends at 0 with the rate.
    parameter-golf #1729: from a share of the budget on, wd falls linearly to a part of itself.
    """
    ramp = config.weight_decay_ramp * (1.0 - lr_mult)
    start = config.weight_decay_taper_start
    if progress <= start:
        return ramp
    gone = (progress - start) / (1.0 - start) * (1.0 - config.weight_decay_taper_final)
    return ramp - gone * (config.weight_decay + ramp)
