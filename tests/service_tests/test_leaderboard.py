"""Who is on the leaderboard, in which order, and how sure that is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from search_spaces.tracks import TRACKS
from service.cli import main
from service.reports.leaderboard import leaderboard, mean_interval
from service.reports.seed_noise import TYPICAL_SEED_SD, SeedNoise, seed_noise, shrink
from service.reports.study_view import view_trials
from service.tracking.outbox import open_entry
from service.trial import TrialFolder, TrialSpec, Verdict, write_json
from service.trial_book import trial_folder
from trainer.recipes import RECIPES
from trainer.report import TrainResult

CAP = TRACKS["laptop"].artifact_bytes or 0


def add_trial(
    study: optuna.Study,
    study_dir: Path,
    value: float,
    *,
    lr: float,
    seed: int,
    size: int = 150_000,
    verdict: str | None = "feasible",
    duplicate_of: int | None = None,
) -> None:
    """A measured trial as the scheduler leaves it."""
    trial = study.ask()
    overrides = {"optim.matrix_lr": lr, "runtime.seed": seed}
    config = RECIPES["tiny"].build().with_overrides(overrides)
    folder = trial_folder(study_dir, trial.number)
    folder.mkdir(parents=True)
    spec = TrialSpec(study.study_name, trial.number, "tiny", overrides, config, folder)
    open_entry(spec)
    files = TrialFolder(folder)
    write_json(files.config, config.to_dict())
    result = TrainResult(
        status="finished",
        steps=40 + seed,
        tokens=1,
        num_params=1,
        world_size=1,
        device="cpu",
        phases={"train": 7.0 + seed / 10, "evaluate": 2.0},
        val_bpb=value,
        bytes_code=20_000,
        bytes_model=size - 20_000,
    )
    write_json(files.result, result.model_dump(mode="json"))
    ok = size <= CAP
    files.write_verdicts([Verdict("bytes", size, CAP, "bytes", ok, "over the cap", False)])
    if verdict is not None:
        trial.set_user_attr("verdict", verdict)
    if duplicate_of is not None:
        trial.set_user_attr("duplicate_of", duplicate_of)
    study.tell(trial, value)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/caddie.db", study_name="s")
    study.set_user_attr("track", "laptop")
    return study


def test_seeds_of_one_configuration_are_one_row(study: optuna.Study, tmp_path: Path) -> None:
    study_dir = tmp_path / "s"
    for value, lr, seed in ((2.30, 0.02, 1), (2.20, 0.04, 1), (2.24, 0.04, 2), (2.28, 0.04, 3)):
        add_trial(study, study_dir, value, lr=lr, seed=seed)
    best, second = leaderboard(view_trials(study, study_dir), CAP)
    assert (best.rank, best.numbers, best.seeds, best.n) == (1, [1, 2, 3], [1, 2, 3], 3)
    assert best.mean == pytest.approx(2.24)
    # sd 0.04, Student's t for 2 degrees of freedom: 4.302653 * 0.04 / sqrt(3)
    assert best.interval == pytest.approx([2.24 - 0.0993655, 2.24 + 0.0993655], abs=1e-6)
    assert best.overrides == {"optim.matrix_lr": 0.04}
    assert (best.bytes_total, best.bytes_left) == (150_000, CAP - 150_000)
    assert (best.train_seconds, best.eval_seconds, best.steps) == (7.3, 2.0, 41)
    assert (second.n, second.interval) == (1, None)


def test_what_does_not_fit_does_not_rank(study: optuna.Study, tmp_path: Path) -> None:
    study_dir = tmp_path / "s"
    add_trial(study, study_dir, 2.0, lr=0.02, seed=1, size=CAP + 1, verdict="infeasible")
    add_trial(study, study_dir, 1.9, lr=0.03, seed=1, size=CAP + 1, verdict=None)
    add_trial(study, study_dir, 2.5, lr=0.04, seed=1)
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.ask()
    rows = leaderboard(view_trials(study, study_dir), CAP)
    assert [row.numbers for row in rows] == [[2]]


def test_a_repeated_result_is_not_a_second_seed(study: optuna.Study, tmp_path: Path) -> None:
    study_dir = tmp_path / "s"
    add_trial(study, study_dir, 2.5, lr=0.04, seed=1)
    add_trial(study, study_dir, 2.5, lr=0.04, seed=1, duplicate_of=0)
    (row,) = leaderboard(view_trials(study, study_dir), CAP)
    assert (row.numbers, row.n, row.interval) == ([0], 1, None)


def test_a_lucky_seed_ranks_below_a_mean_of_many(study: optuna.Study, tmp_path: Path) -> None:
    """2.2990 once, against 2.2992 four times, where seeds move a score by about 0.001."""
    study_dir = tmp_path / "s"
    add_trial(study, study_dir, 2.2990, lr=0.01, seed=1)
    for seed, noise in enumerate((-0.001, 0.001, -0.001, 0.001)):
        add_trial(study, study_dir, 2.2992 + noise, lr=0.02, seed=seed)
    for place in range(6):
        add_trial(study, study_dir, 2.300 + 0.0004 * place, lr=0.03 + place / 100, seed=1)
    rows = leaderboard(view_trials(study, study_dir), CAP)
    many, lucky = rows[:2]
    assert (many.n, lucky.n) == (4, 1)
    assert lucky.mean < many.mean < many.expected < lucky.expected


def test_seed_noise_is_the_study_s_own_where_it_has_seeds() -> None:
    assert seed_noise([[2.0], [2.1]]).sd == TYPICAL_SEED_SD
    own = seed_noise([[2.0, 2.02], [2.1, 2.1 + 0.02, 2.1 - 0.02]])
    # (0.0002 * 1 + 0.0004 * 2) / 3
    assert own.is_own and own.sd == pytest.approx((0.001 / 3) ** 0.5)
    assert "this study" in str(own)


def test_shrinking_recovers_true_scores_better_than_means_do() -> None:
    """Made-up configurations with known truths: the winner's promise is kept on average."""
    random = np.random.default_rng(3)
    noise = SeedNoise(0.001, is_own=True)
    optimism, promise = [], []
    for _ in range(400):
        truths = random.normal(2.3, 0.001, 20)
        seen = truths + random.normal(0, 0.001, 20)
        winner = int(seen.argmin())
        expected = shrink(seen.tolist(), [1] * 20, noise)
        optimism.append(truths[winner] - seen[winner])
        promise.append(truths[winner] - expected[winner])
    assert np.mean(optimism) > 0.001
    assert abs(np.mean(promise)) < 0.2 * np.mean(optimism)
    assert shrink([2.0, 2.1], [1, 1], noise) == [2.0, 2.1]


def test_one_value_has_no_interval() -> None:
    assert mean_interval([2.0]) is None
    # sd sqrt(0.5), t for 1 degree of freedom 12.7062: half width 12.7062 * 0.5
    assert mean_interval([1.0, 2.0]) == pytest.approx([1.5 - 6.3531, 1.5 + 6.3531], abs=1e-4)


def test_the_command_prints_one_list(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_trial(study, tmp_path / "s", 2.5, lr=0.04, seed=1)
    assert main(["leaderboard", "s", "--out", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["number"], row["mean"], row["bytes_left"]) == (0, 2.5, CAP - 150_000)
    assert main(["leaderboard", "s", "--out", str(tmp_path)]) == 0
    assert "optim.matrix_lr=0.04" in capsys.readouterr().out


def test_a_trial_is_shown_whole(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_trial(study, tmp_path / "s", 2.5, lr=0.04, seed=1, size=CAP + 7, verdict="infeasible")
    assert main(["trial", "show", "s", "0", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "COMPLETE" and document["verdict"] == "infeasible"
    constraint = document["constraints"]["bytes"]
    assert (constraint["value"], constraint["bound"], constraint["ok"]) == (CAP + 7, CAP, False)
    assert constraint["predicted"] is False
    assert document["phases"] == {"train": 7.1, "evaluate": 2.0}
    assert document["result"]["val_bpb"] == 2.5
    assert Path(document["paths"]["result.json"]).exists()
    assert main(["trial", "show", "s", "0", "--out", str(tmp_path)]) == 0
    assert "over the cap" in capsys.readouterr().out
    assert main(["trial", "show", "s", "5", "--out", str(tmp_path)]) == 2
    assert "its trials are 0 to 0" in capsys.readouterr().err
