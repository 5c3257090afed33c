"""What `caddie sweep clean` takes away, and above all what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.reports.leaderboard import as_rows, leaderboard
from service.reports.study_view import view_trials
from service.study import add_seed
from service.trial import TrialFolder, TrialSpec
from tests.service_tests.sweeps import DIVERGES, FakeRun, Sweep, plain_space

SPACE = plain_space(2, 3, 4, 2, 3, 4, lr=0.05)
POINTS = [
    {**point, "optim.tied_embed_lr": 0.05 + i / 100} for i, point in enumerate(SPACE.enqueued)
]


def with_artifact(spec: TrialSpec) -> FakeRun:
    """The later, the worse; trial 4 diverges. Everything leaves an artifact and a checkpoint."""
    folder = TrialFolder(spec.folder)
    folder.artifact.write_bytes(bytes(1000))
    folder.checkpoint.write_bytes(bytes(5000))
    return DIVERGES if spec.number == 4 else FakeRun(val_bpb=1.0 + spec.number)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    space = type(SPACE)("plain", "tiny", "laptop", SPACE.axes, tuple(POINTS), "for tests")
    made = Sweep(tmp_path, with_artifact, num_trials=6, space=space)
    made.run()
    return made


def clean(sweep: Sweep, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    out = ("--out", str(sweep.folder.parent))
    assert main(["sweep", "clean", "s", *out, *more, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def rows(sweep: Sweep) -> Any:
    return as_rows(leaderboard(view_trials(sweep.study, sweep.folder), 200_000))


def artifacts(sweep: Sweep) -> list[int]:
    return [int(path.parent.name[-5:]) for path in sorted(sweep.folder.glob("*/artifact.bin"))]


def test_looking_removes_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    found = clean(sweep, capsys, "--keep", "1")
    assert [row["number"] for row in found["removed"]] == [1, 2, 3, 4]
    assert found["bytes"] == 4 * 6000 and not found["applied"]
    assert artifacts(sweep) == [0, 1, 2, 3, 4, 5]


def test_the_best_and_the_newest_stay_and_the_leaderboard_is_the_same(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(sweep)
    found = clean(sweep, capsys, "--keep", "1", "--apply")
    assert found["kept"] == {"0": "rank 1", "5": "among the newest"}
    assert artifacts(sweep) == [0, 5] and not list(sweep.folder.glob("*1/checkpoint.bin"))
    assert rows(sweep) == before and len(before) >= 4
    assert json.loads((sweep.folder / "trial-00001" / "cleaned.json").read_text()) == [
        "artifact.bin",
        "checkpoint.bin",
    ]
    assert clean(sweep, capsys, "--keep", "1")["removed"] == [], "nothing is left to remove"


def test_with_nothing_asked_to_be_kept_the_best_stays(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    clean(sweep, capsys, "--keep", "0", "--apply")
    assert artifacts(sweep) == [0]


def test_confirmed_unfinished_and_wanted_trials_stay(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = sweep.study.get_trials(deepcopy=False)
    seed = add_seed(sweep.study, trials[2], 7, {"confirms": "2"})
    seed.set_user_attr("verdict", "feasible")
    sweep.study.tell(seed, 3.1)
    running = add_seed(sweep.study, trials[1], 9, {})
    for number in (seed.number, running.number):
        folder = sweep.folder / f"trial-{number:05d}"
        folder.mkdir()
        TrialFolder(folder).artifact.write_bytes(b"x")
    settings = dict(sweep.study.user_attrs["overrides"])
    settings["source.checkpoint"] = str(sweep.folder / "trial-00003" / "checkpoint.bin")
    sweep.study.set_user_attr("overrides", settings)
    found = clean(sweep, capsys, "--keep", "0", "--apply")
    assert found["kept"]["3"] == "another trial starts from its file"
    assert found["kept"][str(seed.number)] == "confirmed"
    assert found["kept"][str(running.number)] == "not ended"
    assert found["kept"]["2"] == "confirmed", "the seeds of its configuration are one row"
    assert artifacts(sweep) == [0, 2, 3, seed.number, running.number]
