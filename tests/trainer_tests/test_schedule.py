"""Schedules against the published formulas, written out in the test."""

import pytest

from trainer.config import OptimConfig, ScheduleConfig
from trainer.schedule import extra_weight_decay, lr_multiplier, muon_momentum


def published_baseline(step: int, elapsed_ms: float, cap_ms: float, warmdown_steps: int) -> float:
    """The baseline's rule in its own terms: milliseconds left against milliseconds of warmdown."""
    if step == 0:
        return 1.0
    warmdown_ms = warmdown_steps * elapsed_ms / step
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / warmdown_ms if remaining_ms <= warmdown_ms else 1.0


@pytest.mark.parametrize("step_ms", [43.5, 300.0, 900.0])
def test_warmdown_in_steps_is_the_baselines_rule(step_ms: float) -> None:
    config = ScheduleConfig(warmdown="steps", warmdown_steps=1200)
    cap_ms = 600_000.0
    for step in (0, 1, 50, 700, 1500, 12_000, 13_700):
        elapsed = step * step_ms
        if elapsed > cap_ms:
            continue
        want = published_baseline(step, elapsed, cap_ms, 1200)
        assert lr_multiplier(config, step, elapsed / cap_ms) == pytest.approx(want, abs=1e-12)


def test_warmdown_as_a_fraction() -> None:
    config = ScheduleConfig(warmdown="fraction", warmdown_frac=0.4, min_lr=0.1)
    assert [lr_multiplier(config, 7, p) for p in (0.0, 0.6, 0.8, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.1]
    )


def test_no_warmdown_leaves_the_rate_alone() -> None:
    for config in (
        ScheduleConfig(warmdown="fraction", warmdown_frac=0.0),
        ScheduleConfig(warmdown="steps", warmdown_steps=0),
    ):
        assert lr_multiplier(config, 10, 1.0) == 1.0


def test_momentum_rises_linearly_and_stays() -> None:
    config = OptimConfig(
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500
    )
    values = [muon_momentum(config, step) for step in (0, 250, 500, 9000)]
    assert values == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert muon_momentum(OptimConfig(muon_momentum_warmup_steps=0), 0) == 0.95


def test_momentum_may_rise_over_a_share_of_the_budget() -> None:
    config = OptimConfig(
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_frac=0.2
    )
    values = [muon_momentum(config, 9000, p) for p in (0.0, 0.1, 0.2, 1.0)]
    assert values == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_weight_decay_grows_as_the_rate_falls() -> None:
    """The published script's line: 0.02 + 0.06 (1 - scale)."""
    config = OptimConfig(weight_decay=0.02, weight_decay_ramp=0.06)
    for scale in (1.0, 0.67, 0.0):
        decay = config.weight_decay + extra_weight_decay(config, scale)
        assert decay == pytest.approx(0.02 + 0.06 * (1.0 - scale), abs=1e-15)
    assert extra_weight_decay(OptimConfig(weight_decay=0.3), 0.5) == 0.0


def test_weight_decay_tapers_to_a_part_of_itself() -> None:
    """#1729: full decay up to 0.70 of the budget, then linear to half of it."""
    config = OptimConfig(weight_decay=0.095, weight_decay_taper_start=0.7)
    for progress, part in [(0.0, 1.0), (0.7, 1.0), (0.85, 0.75), (1.0, 0.5)]:
        decay = config.weight_decay + extra_weight_decay(config, 0.3, progress)
        assert decay == pytest.approx(0.095 * part, abs=1e-15)
    both = OptimConfig(
        weight_decay=0.02,
        weight_decay_ramp=0.06,
        weight_decay_taper_start=0.5,
        weight_decay_taper_final=0.0,
    )
    for progress, part in [(0.5, 1.0), (0.9, 0.2), (1.0, 0.0)]:
        decay = both.weight_decay + extra_weight_decay(both, 0.25, progress)
        assert decay == pytest.approx((0.02 + 0.06 * 0.75) * part, abs=1e-15)
    assert extra_weight_decay(OptimConfig(weight_decay=0.3), 0.5, 1.0) == 0.0
