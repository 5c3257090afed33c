"""Bytes against loss: which artifacts are on the front, and where their dots lie."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import optuna
import pytest

from service.reports.study_view import view_trials
from service.reports.trade_picture import (
    BOTTOM,
    FILE,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Point,
    draw_trade,
    front,
    write_trade,
)
from tests.service_tests.test_leaderboard import CAP, add_trial, study  # noqa: F401

POINTS = [
    Point(0, 40_000, 3.0, True),
    Point(1, 60_000, 2.0, True),
    Point(2, 60_000, 2.5, True),
    Point(3, 80_000, 2.1, True),  # larger and worse than 1
    Point(4, 90_000, 1.0, True),
    Point(5, 50_000, 0.5, False),  # breaks a constraint
]
SVG = "{http://www.w3.org/2000/svg}"


def _dots(svg: str) -> dict[int, ElementTree.Element]:
    """By trial number."""
    root = ElementTree.fromstring(svg)
    return {
        int(str(dot.findtext(f"{SVG}title")).split()[1][:-1]): dot
        for dot in root.iter(f"{SVG}circle")
    }


def test_the_front_is_what_no_feasible_artifact_beats() -> None:
    assert [point.trial for point in front(POINTS)] == [0, 1, 4]
    assert [point.trial for point in front([POINTS[5]])] == []


def test_dots_lie_where_their_numbers_say() -> None:
    svg = draw_trade(
        [Point(0, 100_000, 1.0, True), Point(1, 200_000, 2.0, False)], None, 0.8, "a<b"
    )
    dots = _dots(svg)
    # Bytes from 100,000 to 200,000 in steps of 20,000; scores from 0.5 to 2.0 in steps of 0.5.
    assert float(dots[0].attrib["cx"]) == LEFT
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert float(dots[1].attrib["cx"]) == pytest.approx(LEFT + width, abs=0.1)
    rise = float(dots[0].attrib["cy"]) - float(dots[1].attrib["cy"])
    assert rise == pytest.approx(height / 1.5, abs=0.2)
    assert dots[0].attrib["fill"] != dots[1].attrib["fill"]
    assert "a&lt;b" in svg and "before quantisation 0.8000" in svg


def test_an_artifact_far_off_does_not_press_the_others_together() -> None:
    points = [Point(i, 1000 + i, 2.0 + i / 10, True) for i in range(5)]
    without = _dots(draw_trade(points, None, None, ""))
    dots = _dots(draw_trade([*points, Point(9, 1001, 900.0, True)], None, None, ""))
    assert dots[9].attrib["fill"] == "white" and float(dots[9].attrib["cy"]) == TOP
    for trial in range(5):
        assert dots[trial].attrib["cy"] == without[trial].attrib["cy"]


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0, 0.0], [1e-3, 1.7e7], [-2.0, 3.5], [1, 1.001]])
def test_axes_hold_their_values_between_few_round_ticks(values: list[float]) -> None:
    axis = Axis.over(values)
    assert axis.low <= min(values) <= max(values) <= axis.high and axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert len({f"{tick:.{axis.decimals}f}" for tick in axis.ticks}) == len(axis.ticks)


def test_a_study_draws_its_measured_trials_and_the_cap(
    study: optuna.Study,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "s"
    add_trial(study, folder, 2.3, lr=0.02, seed=1, size=150_000)
    assert write_trade(view_trials(study, folder), CAP, folder) is None
    add_trial(study, folder, 2.2, lr=0.03, seed=1, size=190_000)
    add_trial(study, folder, 2.1, lr=0.04, seed=1, size=CAP + 1, verdict="infeasible")
    add_trial(study, folder, 2.2, lr=0.03, seed=1, size=190_000, duplicate_of=1)
    path = write_trade(view_trials(study, folder), CAP, folder)
    assert path == folder / FILE
    dots = _dots(path.read_text())
    assert sorted(dots) == [0, 1, 2]
    assert "breaks a constraint" in str(dots[2].findtext(f"{SVG}title"))
    assert f"cap {CAP:,}" in path.read_text()
