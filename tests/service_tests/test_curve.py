"""The loss curve holds the points it is given, in their places."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from service.tracking.curve import HEIGHT, MARGIN, WIDTH, draw_curve, write_curve
from trainer.report import FileReporter


def test_points_lie_where_their_numbers_say() -> None:
    svg = draw_curve([(0, 6.0), (5, 4.0), (10, 2.0)], [(10, 3.0)], "7: a < b & c")
    ElementTree.fromstring(svg)
    points = re.search(r'points="([^"]*)"', svg)
    assert points is not None
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    middle = f"{WIDTH / 2},{HEIGHT / 2}"
    assert points[1] == f"{MARGIN}.0,{MARGIN}.0 {middle} {right}.0,{bottom}.0"
    quarter = MARGIN + (HEIGHT - 2 * MARGIN) * 0.75
    assert f'cx="{right}.0" cy="{quarter}"' in svg
    assert "7: a &lt; b &amp; c" in svg


def test_a_run_without_two_finite_losses_has_no_curve(tmp_path: Path) -> None:
    with_one = FileReporter(tmp_path)
    with_one.emit("step", step=1, train_loss=3.0, elapsed_s=1.0, step_ms=1.0, tokens_per_s=1.0)
    with_one.emit(
        "step", step=2, train_loss=float("nan"), elapsed_s=1.0, step_ms=1.0, tokens_per_s=1.0
    )
    assert write_curve(tmp_path, "x") is None
    with_one.emit("step", step=3, train_loss=2.0, elapsed_s=1.0, step_ms=1.0, tokens_per_s=1.0)
    path = write_curve(tmp_path, "x")
    assert path is not None and path.name == "curve.svg"
    assert "3.000" in path.read_text() and "2.000" in path.read_text()
