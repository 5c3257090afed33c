"""`caddie simulate` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import main

SMALL = ("--nodes", "2", "--gpus-per-node", "8", "--trials", "6", "--trial-seconds", "60")


def test_the_document_of_a_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overheads = ("--start-seconds", "1", "--teardown-seconds", "0.5", "--gangs", "4,8")
    assert main(["simulate", "smoke", *SMALL, *overheads, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    contract = ("busy_fraction", "simulated_hours", "wall_s", "trials", "gap_s")
    assert found.keys() >= set(contract)
    assert found["trials"]["COMPLETE"] + found["trials"]["PRUNED"] == 6
    assert 0 < found["busy_fraction"] <= 1 and found["gap_s"].keys() == {"p50", "p95"}
    assert 3 * 60 / 3600 > found["simulated_hours"] > 60 / 3600
    assert list(tmp_path.iterdir()) == [], "nothing is kept"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("no_space",), "no space is called 'no_space'"),
        (("smoke", "--gangs", "1,many"), "--gangs '1,many'"),
        (("smoke", *SMALL, "--gangs", "16"), "16 GPUs does not fit a node of 8"),
        (("smoke", *SMALL, "--failures", "1"), "failure_rate = 1"),
    ],
)
def test_what_is_asked_wrongly(
    asked: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *asked]) == 2
    assert words in capsys.readouterr().err
