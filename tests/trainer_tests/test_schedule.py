"""Schedules against the published formulas, written out in the test."""

import pytest
from pydantic import ValidationError

from trainer.config import OptimConfig, ScheduleConfig
from trainer.schedule import (
    decay_multiplier,
    extra_weight_decay,
    lr_multiplier,
    muon_momentum,
)


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


def slowrun(epochs: int, cycles: int) -> ScheduleConfig:
    return ScheduleConfig(
        warmdown="fraction",
        warmdown_frac=0.2,
        warmdown_power=0.5,
        cycles=cycles,
        cycle_share=1 / epochs,
        decay_points=f"1@0.4,0.65@{1 - cycles / epochs}",
        cycle_decay="0.65:1.5",
    )


@pytest.mark.parametrize(
    ("epochs", "cycles", "peaks"),
    [
        (22, 8, [1, 1, 1, 1, 0.95, 0.83, 0.67, 0.48]),  # two hours
        (11, 3, [1, 0.95, 0.67]),  # one hour
    ],
)
def test_cycles_begin_at_the_published_factors_and_end_at_the_floor(
    epochs: int, cycles: int, peaks: list[float]
) -> None:
    config = slowrun(epochs, cycles)
    first = epochs - cycles
    for cycle, peak in enumerate(peaks):
        start, end = (first + cycle) / epochs, (first + cycle + 1 - 1e-7) / epochs
        assert lr_multiplier(config, 9, start) == pytest.approx(peak, abs=0.006)
        middle = (first + cycle + 0.5) / epochs
        top = lr_multiplier(config, 9, start)
        assert lr_multiplier(config, 9, middle) == pytest.approx((top + 0.05) / 2)
        assert lr_multiplier(config, 9, end) == pytest.approx(0.05, abs=1e-6)
        assert decay_multiplier(config, start) == pytest.approx(0.65)
        assert decay_multiplier(config, middle) == pytest.approx((0.65 + 1.5) / 2)
        assert decay_multiplier(config, end) == pytest.approx(1.5, abs=1e-6)
    assert lr_multiplier(config, 9, 1.0) == pytest.approx(0.05)
    assert lr_multiplier(config, 9, (first - 0.01) / epochs) == 1.0


def test_decay_follows_its_points() -> None:
    """slowrun's tiny track: 0.8 until epoch 2 of 15, 0.1 at epoch 8, 0.93 at the end."""
    config = ScheduleConfig(decay_points="0.8@0.1333,0.1@0.5333,0.93@1")
    wanted = {0.0: 0.8, 0.1333: 0.8, 0.3333: 0.45, 0.5333: 0.1, 1.0: 0.93}
    for progress, factor in wanted.items():
        assert decay_multiplier(config, progress) == pytest.approx(factor)
    assert decay_multiplier(slowrun(22, 8), 0.2) == 1.0
    assert decay_multiplier(slowrun(22, 8), (0.4 + 14 / 22) / 2) == pytest.approx(0.825)
    assert decay_multiplier(ScheduleConfig(), 0.7) == 1.0


def test_the_warmdown_bends_and_cycles_follow_the_steps_too() -> None:
    config = ScheduleConfig(warmdown="fraction", warmdown_frac=0.5, warmdown_power=0.5)
    assert lr_multiplier(config, 1, 0.875) == pytest.approx(0.5)
    by_steps = ScheduleConfig(warmdown="steps", warmdown_steps=500, cycles=2, cycle_share=0.25)
    assert lr_multiplier(by_steps, 750, 0.75) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cycles": 2}, r"schedule\.cycles = 2 and schedule\.cycle_share = 0.*set both"),
        ({"cycles": 4, "cycle_share": 0.3}, r"are more than the budget; lower"),
        ({"cycle_decay": "0.6:1"}, r"schedule\.cycle_decay = '0\.6:1' is about cycles"),
        ({"decay_points": "1@0.4,2@0.3"}, r"decay_points = .*share of '2@0\.3' must be above"),
        ({"decay_points": "1"}, r"schedule\.decay_points = '1': '1' is no pair .* VALUE@SHARE"),
    ],
)
def test_schedules_that_do_not_fit_name_their_path_and_the_remedy(
    overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**overrides)
