"""Welch's test against published numbers, and false records counted under the null."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from service.reports.significance import (
    FUTILE_BELOW,
    LOOSE,
    STRICT,
    RecordRule,
    levels,
    look,
    welch,
)

NUM_STUDIES = 4000


def test_welch_is_the_textbook_s() -> None:
    """Published values: the examples of the article "Welch's t-test", to the digits given there."""
    a1 = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    a2 = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    equal = welch(a1, a2)
    assert equal is not None
    assert equal.margin / equal.standard_error == pytest.approx(2.46, abs=0.005)
    assert equal.degrees == pytest.approx(25.0, abs=0.05)
    assert 2 * equal.p_value() == pytest.approx(0.021, abs=0.0005)
    b1 = [17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8]
    b2 = [21.5, 22.8, 21.0, 23.0, 21.6, 23.6, 22.5, 20.7, 23.4, 21.8]
    b2 += [20.7, 21.7, 21.5, 22.5, 23.6, 21.5, 22.5, 23.5, 21.5, 21.8]
    unequal = welch(b1, b2)
    assert unequal is not None
    assert unequal.margin / unequal.standard_error == pytest.approx(1.57, abs=0.005)
    assert unequal.degrees == pytest.approx(9.9, abs=0.05)
    assert 2 * unequal.p_value() == pytest.approx(0.149, abs=0.0005)


def test_a_margin_and_an_interval_are_scipy_s() -> None:
    ours, theirs = [2.310, 2.312, 2.309], [2.322, 2.319, 2.325]
    test = welch(ours, theirs)
    assert test is not None
    shifted = stats.ttest_ind([x - 0.005 for x in theirs], ours, equal_var=False)
    assert test.p_value(0.005) == pytest.approx(shifted.pvalue / 2)
    scipys = stats.ttest_ind(theirs, ours, equal_var=False).confidence_interval(0.95)
    assert test.interval() == pytest.approx([scipys.low, scipys.high])
    assert welch([1.0], theirs) is None


def test_values_without_noise_are_no_division_by_zero() -> None:
    test = welch([2.0, 2.0], [2.01, 2.01])
    assert test is not None
    assert (test.p_value(), test.p_value(0.02)) == (0.0, 1.0)
    tiny = welch([1e-200, 2e-200], [3e-200, 4e-200])
    assert tiny is not None and tiny.degrees == pytest.approx(2.0)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 10])
def test_the_levels_spend_alpha_and_no_more(num_pairs: int) -> None:
    spent = levels(0.01, num_pairs)
    assert list(spent) == list(range(2, num_pairs + 1))
    assert sum(spent.values()) == pytest.approx(0.01)
    assert levels(0.01, num_pairs, fixed=True) == {num_pairs: 0.01}


def share_of_records(
    rule: RecordRule, true_margin: float, num_pairs: int, sd_ratio: float = 1.0, sd: float = 0.002
) -> tuple[float, float]:
    """(share of confirmations that end in a record, mean pairs run), each stopped as a
    confirmation stops: at success, at futility, at the end."""
    random = np.random.default_rng(1000 * num_pairs + int(10 * sd_ratio))
    shape = (NUM_STUDIES, num_pairs)
    candidates = random.normal(2.3 - true_margin, sd * sd_ratio, shape)
    incumbents = random.normal(2.3, sd, shape)
    records, pairs = 0, 0
    for ours, theirs in zip(candidates.tolist(), incumbents.tolist(), strict=True):
        for n in range(2, num_pairs + 1):
            seen = look(ours[:n], theirs[:n], num_pairs, rule)
            assert seen is not None
            if seen.holds or seen.chance < FUTILE_BELOW:
                break
        records += seen.holds
        pairs += n
    return records / NUM_STUDIES, pairs / NUM_STUDIES


@pytest.mark.parametrize("rule", [STRICT, LOOSE], ids=["strict", "loose"])
@pytest.mark.parametrize("sd_ratio", [1.0, 3.0])
def test_false_records_stay_below_the_nominal_rate(rule: RecordRule, sd_ratio: float) -> None:
    """The hardest null: the candidate is better by exactly the margin that is not enough."""
    share, _ = share_of_records(rule, rule.margin_nats, num_pairs=4, sd_ratio=sd_ratio)
    error = (rule.alpha * (1 - rule.alpha) / NUM_STUDIES) ** 0.5
    assert share <= rule.alpha + 3 * error


def test_stopping_at_the_first_p_below_alpha_would_not_keep_the_rate() -> None:
    """The simulation can tell: without spending, looks add up."""
    random = np.random.default_rng(5)
    ours, theirs = random.normal(0, 1, (NUM_STUDIES, 8)), random.normal(0, 1, (NUM_STUDIES, 8))
    false = 0
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        tests = [welch(a[:n], b[:n]) for n in range(2, 9)]
        false += any(test is not None and test.p_value() < LOOSE.alpha for test in tests)
    assert false / NUM_STUDIES > LOOSE.alpha + 0.05


def test_a_clear_record_is_found_early_and_a_lost_one_given_up_early() -> None:
    won, pairs_won = share_of_records(STRICT, 0.020, num_pairs=5)
    assert won > 0.9 and pairs_won < 4.7
    lost, pairs_lost = share_of_records(STRICT, 0.0, num_pairs=5)
    assert lost == 0.0 and pairs_lost < 3.0


def test_a_later_bad_pair_does_not_take_a_record_back() -> None:
    ours, theirs = [2.0, 2.0, 2.2], [2.1, 2.1, 2.1]
    first = look(ours[:2], theirs[:2], 3, STRICT)
    assert first is not None and first.holds
    later = look(ours, theirs, 3, STRICT)
    assert later is not None and later.holds and later.p_value > 0.01
    assert look(ours, theirs, 3, STRICT, fixed=True).holds is False  # type: ignore[union-attr]
