"""Learning-rate multiplier, momentum and weight decay at a point of the run.

Schedules follow `progress`, the share of the budget that is spent (0 at the start, 1 at the cap),
so that a faster machine does not see a different schedule. Plain float arithmetic, no torch.
"""

from trainer.config import OptimConfig, ScheduleConfig


def lr_multiplier(config: ScheduleConfig, step: int, progress: float) -> float:
    """Multiplier of every learning rate for the step that is about to run, in [min_lr, 1].

    With warmdown "fraction" f: 1 until progress 1 - f, then linear to 0 at progress 1. With
    "steps" W: the share of the budget that W steps take at the present mean step time, as the
    challenge's baseline does: f = W * progress / step. On a machine so slow that W steps are the
    whole budget, that one decays from the first step on.
    """
    if config.warmdown == "fraction":
        share = config.warmdown_frac
    elif step == 0:
        return 1.0
    else:
        share = config.warmdown_steps * progress / step
    if share <= 0:
        return 1.0
    return max(config.min_lr, min(1.0, max(0.0, 1.0 - progress) / share))


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
