"""Seeds in pairs: what runs in which order, what ends it, and that a kill loses nothing."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from service.confirm import CANDIDATE, INCUMBENT, Confirmation, Plan, Side, Stop
from service.errors import StudyBusyError
from service.filters import default_filters
from service.judge import Judge
from service.lease import DriverLease
from service.policies import Policy
from service.reports.leaderboard import leaderboard
from service.reports.significance import LOOSE, STRICT
from service.reports.study_view import view_trials
from service.runners.base import Demand
from service.runners.fake_runner import FakeRun, FakeRunner
from service.status import status_of
from service.study import CONFIRMS, ask_to_stop, frozen_trials, load_study
from service.trial import TrialSpec
from service.trial_book import TrialBook
from tests.service_tests.sweeps import SMOKE, TRACK, Sweep, plain_space

SHALLOW, DEEP, DEEPER = 2, 3, 4
"""Depths of the trials 0, 1 and, where there is one, 2."""
Score = Callable[[int, int], float]
"""(depth, seed) -> bits per byte; the fake runner's nats are the same number."""


def better_by(margin: float) -> Score:
    """Deep is better by the margin; seeds move both by a thousandth."""
    return lambda depth, seed: 2.0 - margin * (depth == DEEP) + 0.001 * (seed % 3)


@cache
def scored(*depths: int) -> Path:
    """A folder with the study "s" of scored trials of these depths, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="caddie-scored-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    runs = [FakeRun(val_bpb=2.0, bytes_model=100_000) for _ in depths]
    sweep = Sweep(folder, runs, num_trials=len(depths), space=plain_space(*depths))
    sweep.run()
    assert set(sweep.states()) == {"COMPLETE"}
    return folder


class Bench:
    """A study with scored trials, and confirmations of the others against the first."""

    def __init__(
        self, folder: Path, score: Score, slots: int = 1, depths: tuple[int, ...] = (SHALLOW, DEEP)
    ) -> None:
        self.numbers = range(1, len(depths))
        self.candidates: list[Side] = []
        self.folder, self.score, self.slots = folder, score, slots
        self.over_cap_seed: int | None = None
        self.fails: set[int] = set()
        shutil.copytree(scored(*depths), folder, dirs_exist_ok=True)
        self.url = f"sqlite:///{folder / 'caddie.db'}"
        self.now = 1_000_100.0
        self.runner = FakeRunner(self.script)

    def script(self, spec: TrialSpec) -> FakeRun:
        seed = spec.config.runtime.seed
        if seed in self.fails:
            return FakeRun(fails_at_s=2.0)
        size = 300_000 if seed == self.over_cap_seed else 100_000
        return FakeRun(
            train_s=8.0,
            val_bpb=self.score(spec.config.model.num_layers, seed),
            bytes_model=size,
        )

    @property
    def candidate(self) -> Side:
        """Of the confirmation that began last."""
        return self.candidates[0]

    @property
    def study(self) -> optuna.Study:
        return load_study("s", self.url)

    def begin(self, num_pairs: int = 5, at_once: int = 1, **plan: object) -> Confirmation:
        self.runner = FakeRunner(self.script, slots=self.slots)
        self.runner.advance(self.now - 1_000_000.0 + 1.0)
        study = self.study
        sides = []
        names = [(CANDIDATE if n == 1 else f"{CANDIDATE} {n}", n) for n in self.numbers]
        for name, number in (*names, (INCUMBENT, 0)):
            book = TrialBook(
                study=study,
                base=SMOKE.base(),
                recipe=SMOKE.recipe,
                overrides={f"budget.{k}": v for k, v in TRACK.budget().model_dump().items()},
                study_dir=self.folder / "s",
                demand_of=lambda _: Demand(workers=2),
                provenance={},
                trackers=[],
                clock=self.runner.now,
            )
            judge = Judge(default_filters(track=TRACK.name))
            sides.append(Side(name, study, frozen_trials(study)[number], book, judge))
        self.candidates = sides[:-1]
        return Confirmation(
            Plan("s:1 against s:0", num_pairs, **plan),  # type: ignore[arg-type]
            sides[:-1],
            sides[-1],
            self.runner,
            Demand(workers=2),
            at_once,
            Policy(),
            self.runner.now,
        )

    def finish(self, run: Confirmation, turns: int = 2000) -> Confirmation:
        for _ in range(turns):
            if not run.step():
                run.close()
                self.now = self.runner.now()
                return run
            self.runner.advance(1.0)
        raise AssertionError("the confirmation did not end")

    def seeds(self) -> list[optuna.trial.FrozenTrial]:
        return [t for t in frozen_trials(self.study) if CONFIRMS in t.user_attrs]


def depths(bench: Bench) -> list[int]:
    return [spec.config.model.num_layers for spec in bench.runner.submissions]


def test_pairs_take_turns_on_one_gang_with_seeds_nobody_has_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.0051), slots=4)
    run = bench.begin(num_pairs=3, fixed=True)
    run.step()
    assert len(bench.runner.submissions) == 1  # though four would fit
    bench.finish(run)
    assert depths(bench) == [DEEP, SHALLOW, SHALLOW, DEEP, DEEP, SHALLOW]
    used = [spec.config.runtime.seed for spec in bench.runner.submissions]
    default = SMOKE.base().runtime.seed
    assert len(set(used)) == 6 and default not in used
    assert run.stopped_by(bench.candidate) is Stop.ENOUGH
    # One difference with the sweep's own trial: the seed.
    first = bench.runner.submissions[0].config
    assert (
        first.with_overrides({"runtime.seed": default}).digest()
        == (frozen_trials(bench.study)[1].user_attrs["digest"])
    )


def three(margins: dict[int, float]) -> Score:
    return lambda depth, seed: 2.0 - margins.get(depth, 0.0) + 0.001 * (seed % 3)


def test_candidates_share_the_incumbent_and_each_ends_by_itself(tmp_path: Path) -> None:
    score = three({DEEP: -0.01, DEEPER: 0.5})
    bench = Bench(tmp_path, score, depths=(SHALLOW, DEEP, DEEPER))
    run = bench.finish(bench.begin(num_pairs=10))
    order = depths(bench)
    assert order[:6] == [DEEP, DEEPER, SHALLOW, SHALLOW, DEEPER, DEEP]
    worse, better = bench.candidates
    assert run.stopped_by(worse) is Stop.FUTILE and run.stopped_by(better) is Stop.RECORD
    assert order.count(DEEP) == 2, "seeds of a candidate that was given up"
    assert order.count(DEEPER) == order.count(SHALLOW)
    gain = run.standing(better).test
    assert gain is not None and gain.margin == pytest.approx(0.5, abs=0.01)


def test_candidates_share_the_p_of_the_rule(tmp_path: Path) -> None:
    """Three chances of a false record must not be three times as likely as one."""
    levels = []
    for name, all_depths in (("one", (SHALLOW, DEEP)), ("two", (SHALLOW, DEEP, DEEPER))):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name, three({}), depths=all_depths)
        run = bench.finish(bench.begin(num_pairs=3, fixed=True))
        strict = run.standing(bench.candidate).strict
        assert strict is not None
        levels.append(strict.level)
    assert levels == [pytest.approx(0.01), pytest.approx(0.005)]


def test_several_killed_go_on_as_one_would(tmp_path: Path) -> None:
    score = three({DEEP: -0.01, DEEPER: 0.02})
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", score, depths=(SHALLOW, DEEP, DEEPER))
    whole.finish(whole.begin(num_pairs=4))
    (tmp_path / "cut").mkdir()
    bench = Bench(tmp_path / "cut", score, depths=(SHALLOW, DEEP, DEEPER))
    run = bench.begin(num_pairs=4)
    for _ in range(100):
        run.step()
        bench.runner.advance(0.5)
    bench.now = bench.runner.now()
    bench.study.set_user_attr("driver", None)  # as a lease whose process is gone
    bench.finish(bench.begin(num_pairs=4))
    told = [
        sorted((t.params["runtime.seed"], t.value) for t in each.seeds()) for each in (whole, bench)
    ]
    assert told[0] == told[1]


def test_a_clear_record_ends_early_and_stands_on_the_leaderboard(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.5))
    run = bench.finish(bench.begin(num_pairs=5))
    standing = run.standing(bench.candidate)
    assert run.stopped_by(bench.candidate) is Stop.RECORD
    assert standing.meets(standing.strict) and standing.meets(standing.loose)
    assert standing.test is not None and standing.test.margin == pytest.approx(0.5, abs=0.01)
    assert len(standing.candidate) < 5
    best = leaderboard(view_trials(bench.study, tmp_path / "s"), TRACK.artifact_bytes)[0]
    assert best.overrides["model.num_layers"] == DEEP
    assert best.n == 1 + len(standing.candidate) and best.interval is not None


def test_a_gain_below_the_margin_is_loose_at_most(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.004))
    run = bench.finish(bench.begin(num_pairs=6, fixed=True))
    standing = run.standing(bench.candidate)
    assert not standing.meets(standing.strict) and standing.meets(standing.loose)


def test_no_gain_is_given_up_early(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(-0.01))
    run = bench.finish(bench.begin(num_pairs=10))
    assert run.stopped_by(bench.candidate) is Stop.FUTILE
    assert len(bench.seeds()) == 4
    standing = run.standing(bench.candidate)
    assert not standing.meets(standing.strict) and not standing.meets(standing.loose)


def test_the_loose_rule_may_end_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.004))
    run = bench.finish(bench.begin(num_pairs=6, rule=LOOSE))
    assert run.stopped_by(bench.candidate) is Stop.RECORD
    standing = run.standing(bench.candidate)
    assert standing.meets(standing.loose) and not standing.meets(standing.strict)
    assert STRICT.margin_nats > 0.004


def test_a_seed_over_the_cap_is_no_record_however_good_its_loss(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.5))
    bench.over_cap_seed = SMOKE.base().runtime.seed + 1  # the candidate's first
    run = bench.finish(bench.begin())
    standing = run.standing(bench.candidate)
    assert run.stopped_by(bench.candidate) is Stop.BROKEN
    assert standing.broken is not None and "bytes" in standing.broken
    assert not standing.meets(standing.strict) and not standing.meets(standing.loose)


@pytest.mark.parametrize("turns", [0, 8, 40])
def test_killed_anywhere_it_goes_on_with_the_same_seeds(tmp_path: Path, turns: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", better_by(0.02))
    whole.finish(whole.begin(num_pairs=3, fixed=True))
    expected = sorted((t.params["runtime.seed"], t.value) for t in whole.seeds())

    (tmp_path / "cut").mkdir()
    bench = Bench(tmp_path / "cut", better_by(0.02))
    run = bench.begin(num_pairs=3, fixed=True)
    for _ in range(turns):
        run.step()
        bench.runner.advance(0.5)
    bench.now = bench.runner.now()
    bench.study.set_user_attr("driver", None)  # as a lease whose process is gone
    again = bench.finish(bench.begin(num_pairs=3, fixed=True))
    assert sorted((t.params["runtime.seed"], t.value) for t in bench.seeds()) == expected
    assert (
        again.standing(bench.candidate).test is not None
        and len(again.standing(bench.candidate).candidate) == 3
    )


def test_asked_to_stop_it_puts_its_seed_back_and_a_sweep_may_run_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.02))
    run = bench.begin(num_pairs=3, fixed=True)
    for _ in range(4):
        run.step()
        bench.runner.advance(0.5)
    ask_to_stop(bench.study, 0.0)
    bench.runner.advance(2.0)
    bench.finish(run)
    assert run.stopped_by(bench.candidate) is Stop.REQUESTED
    assert [t.state for t in bench.seeds()] == [TrialState.WAITING]

    sweep = Sweep(
        tmp_path,
        bench.script,
        num_trials=3,
        space=plain_space(SHALLOW, DEEP),
        start_at=bench.now - 1_000_000.0,
    )
    sweep.run()
    (seed,) = bench.seeds()
    assert seed.state == TrialState.COMPLETE
    assert status_of(bench.study).told == 3  # the seed is a fourth, and counts towards no sweep
    bench.now = sweep.runner.now()
    again = bench.finish(bench.begin(num_pairs=3, fixed=True))
    assert again.standing(bench.candidate).candidate[0].number == seed.number


def test_failures_are_tried_again_with_another_seed_then_given_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.02))
    default = SMOKE.base().runtime.seed
    bench.fails = {default + 1}
    run = bench.finish(bench.begin(num_pairs=2, fixed=True))
    assert (
        run.stopped_by(bench.candidate) is Stop.ENOUGH
        and len(run.standing(bench.candidate).candidate) == 2
    )
    assert [t.state.name for t in bench.seeds()].count("FAIL") == 1

    bench.fails = set(range(1000))
    study_before = len(bench.seeds())
    bench.fails = {seed for seed in range(10_000) if seed > default + 5}
    worse = bench.begin(num_pairs=9, fixed=True)
    bench.finish(worse)
    assert worse.stopped_by(bench.candidate) is Stop.IN_VAIN
    assert len(bench.seeds()) - study_before <= 4


def test_a_sweep_and_a_confirmation_keep_out_of_each_other_s_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path, better_by(0.02))
    run = bench.begin()
    with pytest.raises(StudyBusyError):
        DriverLease(bench.study, bench.runner.now)
    run.close()
    DriverLease(bench.study, bench.runner.now).release()
