"""`caddie confirm` asked wrongly: one message, and nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_spaces.tracks import TRACKS
from service.cli import main
from service.runners.fake_runner import FakeRun
from tests.service_tests.sweeps import Sweep, plain_space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trial 0 is scored, trial 1 rejected before launch; nobody else is on the leaderboard."""
    out = tmp_path_factory.mktemp("runs")
    runs = [FakeRun(val_bpb=2.0)]
    Sweep(out, runs, num_trials=2, slots=1, space=plain_space(3, 8), track=TRACKS["laptop"]).run()
    return out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trial", "9"), "has no trial 9; it has 2 trials"),
        (("--trial", "1"), "trial s:1 has no score (rejected before launch)"),
        (("--trial", "0", "--against", "smoke"), "write it as STUDY:M"),
        (("--trial", "0", "--against", "s:0"), "that is the candidate itself"),
        (("--trial", "0", "--against", "s:1", "--seeds", "1"), "ask for --seeds 2"),
        (("--trial", "0", "--trial", "0"), "each candidate once"),
        (("--trial", "9", "--trial", "0"), "has no trial 9; it has 2 trials"),
        (("--trial", "x"), "--trial"),
    ],
)
def test_wrong_questions_touch_nothing(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("trial-*"))
    assert main(["confirm", "s", *arguments, "--out", str(folder), "--runner", "local"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert sorted(folder.rglob("trial-*")) == before
