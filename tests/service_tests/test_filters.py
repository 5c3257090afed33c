"""What each filter says, in numbers. How the loop acts on it: test_scheduler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from service.filters import FILTERS, default_filters
from service.filters.divergence import Divergence
from service.filters.duplicate import Duplicates
from service.filters.legality import Legality
from service.filters.step_time import StepTime
from service.run import number
from service.trial import TrialSpec
from trainer.config import TrainConfig
from trainer.recipes import RECIPES
from trainer.report import TrainResult

GOLF = RECIPES["golf_baseline"].build()
TINY = RECIPES["tiny"].build()


def spec_of(config: TrainConfig) -> TrialSpec:
    return TrialSpec("s", 0, "tiny", {}, config, Path("/nowhere"))


def result_of(**fields: Any) -> TrainResult:
    common: dict[str, Any] = {"status": "finished", "steps": 100, "tokens": 1, "num_params": 1}
    common |= {"world_size": 1, "device": "cpu", "phases": {}}
    return TrainResult(**{**common, **fields})


def steps(*points: tuple[int, float, float], total_s: float = 100.0) -> list[dict[str, Any]]:
    """Records of (step, seconds, loss)."""
    return [
        {
            "kind": "step",
            "step": step,
            "elapsed_s": elapsed,
            "progress": elapsed / total_s,
            "train_loss": loss,
        }
        for step, elapsed, loss in points
    ]


def test_a_run_without_steps_of_its_own_needs_no_minimum_of_them() -> None:
    short = TINY.with_overrides({"budget.min_steps": 20})
    restored = short.with_overrides({"source.checkpoint": "checkpoint.bin"})
    verdict = StepTime().after_finish(spec_of(short), result_of(steps=0))
    assert verdict is not None and not verdict.ok
    assert StepTime().after_finish(spec_of(restored), result_of(steps=0)) is None


def test_no_cap_no_verdict() -> None:
    free = TINY.with_overrides(
        {"budget.artifact_bytes": None, "budget.eval_seconds": None, "budget.min_steps": 0}
    )
    result = result_of(bytes_code=1, bytes_model=10**9, val_bpb=1.0, phases={"train": 1.0})
    for judge in default_filters():
        for verdict in (
            judge.before_launch(spec_of(free)),
            judge.while_running(spec_of(free), steps((1, 0.1, 6.0), (40, 1.0, 5.0))),
            judge.after_finish(spec_of(free), result),
        ):
            assert verdict is None or verdict.name == "train_seconds"


def test_step_time_forecast_is_marginal_and_tolerant() -> None:
    spec = spec_of(TINY.with_overrides({"budget.train_seconds": 100.0, "budget.min_steps": 100}))
    judge = StepTime()
    cold_start = steps((1, 9.0, 6.0), (11, 18.0, 5.0))  # 0.9 s a step after a slow first one
    assert judge.while_running(spec, cold_start) is None, "11 + 82 / 0.9 = 102 steps fit"
    slow = steps((1, 1.0, 6.0), (11, 21.0, 5.0))  # 2 s a step
    verdict = judge.while_running(spec, slow)
    assert verdict is not None
    assert (verdict.value, verdict.bound, verdict.ok) == (round(11 + 79 / 2), 100, False)
    nearly = steps((1, 1.0, 6.0), (11, 11.9, 5.0))  # 91.8 steps: within the tolerance
    assert judge.while_running(spec, nearly) is None


def test_step_time_waits_for_ten_steps_or_a_quarter_of_the_budget() -> None:
    spec = spec_of(TINY.with_overrides({"budget.train_seconds": 100.0, "budget.min_steps": 100}))
    judge = StepTime()
    assert judge.while_running(spec, steps((1, 5.0, 6.0), (4, 20.0, 5.0))) is None
    assert judge.while_running(spec, steps((1, 5.0, 6.0), (5, 25.0, 5.0))) is not None
    assert judge.while_running(spec, steps((1, 50.0, 6.0))) is None


def test_step_time_never_asks_for_more_than_max_steps() -> None:
    changes = {"budget.train_seconds": 100.0, "budget.min_steps": 100, "budget.max_steps": 15}
    spec = spec_of(TINY.with_overrides(changes))
    assert StepTime().while_running(spec, steps((1, 1.0, 6.0), (11, 41.0, 5.0))) is None
    measured = StepTime().after_finish(spec, result_of(steps=15))
    assert measured is not None and measured.ok and not measured.predicted


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_divergence_of_a_loss_that_is_no_number_has_a_value_that_is_one(loss: float) -> None:
    verdict = Divergence().while_running(spec_of(TINY), steps((7, 1.0, loss)))
    assert verdict is not None and not verdict.ok
    assert f"step 7 is {loss}" in verdict.reason
    assert math.isfinite(verdict.value) and math.isfinite(verdict.excess)


@pytest.mark.parametrize("written", ["nan", "inf", None])
def test_records_may_name_what_json_cannot_hold(written: str | None) -> None:
    assert not math.isfinite(number(written))
    assert number(2) == 2.0


GUESS = math.log(512)


@pytest.mark.parametrize(
    ("every_s", "losses", "bound"),
    [
        (10.0, (6.0, GUESS + 2, GUESS + 2), 7.0),
        (10.0, (GUESS + 2, GUESS + 2), GUESS + 1),
        (10.0, (GUESS + 2, GUESS + 0.9), None),
        (10.0, (5.0, 3.0, 4.1, 4.05), 4.0),
        (10.0, (5.0, 3.0, 4.1, 3.9, 4.05), None),  # it came back in between
        (10.0, (5.0, 3.0, 3.1, 30.0), None),  # one record may be a spike
        (1.0, (5.0, 12.0, 18.0, 16.0, 9.0), None),  # the first 5 % may jump
        (1.0, (5.0,) * 9 + (9.0,) * 5, None),  # above for 4 % of the budget
        (1.0, (5.0,) * 9 + (9.0,) * 7, 6.0),  # and for 6 %
    ],
)
def test_divergence_is_staying_above_guessing_and_the_past(
    every_s: float, losses: tuple[float, ...], bound: float | None
) -> None:
    records = steps(*((i, every_s * i, loss) for i, loss in enumerate(losses, start=1)))
    verdict = Divergence().while_running(spec_of(TINY), records)
    assert (None if verdict is None else verdict.bound) == (
        None if bound is None else pytest.approx(bound)
    )


def test_duplicates_belong_to_their_first_claimer_until_it_fails() -> None:
    duplicates = Duplicates()
    assert duplicates.claim("a", 0) is None
    assert duplicates.claim("a", 0) is None
    assert duplicates.claim("a", 1) == 0
    duplicates.release("a", 1)
    assert duplicates.claim("a", 1) == 0, "only the owner can let go"
    duplicates.release("a", 0)
    assert duplicates.claim("a", 1) is None


def test_legality_is_the_tracks_and_says_which_rule_is_broken() -> None:
    both = spec_of(TINY.with_overrides({"data.train_split": "val", "evaluate.ngram_weight": 0.3}))
    verdict = Legality("golf-10min-16mb").before_launch(both)
    assert verdict is not None and not verdict.ok and not verdict.predicted
    assert (verdict.value, verdict.bound, verdict.excess) == (2, 0, 2)
    assert verdict.reason.startswith("illegal on golf-10min-16mb: data.train_split trains on")
    assert "evaluate.ngram_weight" in verdict.reason
    assert Legality("golf-10min-16mb").before_launch(spec_of(TINY)) is None
    assert Legality("night").before_launch(both) is None, "a user's track has the user's rules"


def test_every_filter_of_the_table_is_in_the_default() -> None:
    assert [type(judge) for judge in default_filters()] == [
        type(make()) for make in FILTERS.values()
    ]
