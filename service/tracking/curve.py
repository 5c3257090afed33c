"""A picture of a run's loss, drawn as SVG by hand: MLflow shows it beside the run's files.

No plotting library: two polylines and four labels are not worth one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.tracking.outbox import new_records

WIDTH, HEIGHT, MARGIN = 640, 360, 48
MAX_RECORDS = 100_000


def write_curve(folder: Path, title: str) -> Path | None:
    """Draw metrics.jsonl of a trial folder into curve.svg; None when there is nothing to draw."""
    text = curve_of(folder, title)
    if text is None:
        return None
    path = folder / "curve.svg"
    path.write_text(text)
    return path


def curve_of(folder: Path, title: str) -> str | None:
    """The picture of a trial folder's metrics.jsonl."""
    records, _ = new_records(folder, 0, MAX_RECORDS)
    train = _points(records, "step", "train_loss")
    if len(train) < 2:
        return None
    return draw_curve(train, _points(records, "val", "val_loss"), title)


def draw_curve(
    train: Sequence[tuple[float, float]], val: Sequence[tuple[float, float]], title: str
) -> str:
    """An SVG of losses over steps.

    Args:
        train: At least two (step, nats per token), drawn as a line.
        val: The same of validations, drawn as dots.
    """
    steps = [step for step, _ in (*train, *val)]
    losses = [loss for _, loss in (*train, *val)]
    low, high = min(losses), max(losses)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * _share(step, min(steps), max(steps))
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * _share(loss, low, high)
        return round(x, 1), round(y, 1)

    line = " ".join("{},{}".format(*place(*point)) for point in train)
    dots = "".join('<circle cx="{}" cy="{}" r="4"/>'.format(*place(*point)) for point in val)
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{right}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>'
        f'<g fill="#d1242f">{dots}</g>'
        f'<text x="{MARGIN}" y="24">{safe}</text>'
        f'<text x="4" y="{MARGIN}">{high:.3f}</text><text x="4" y="{bottom}">{low:.3f}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 20}">step {min(steps):g}</text>'
        f'<text x="{right}" y="{HEIGHT - 20}" text-anchor="end">step {max(steps):g}</text>'
        "</svg>\n"
    )


def _points(records: Sequence[dict[str, Any]], kind: str, field: str) -> list[tuple[float, float]]:
    found = []
    for record in records:
        if record["kind"] != kind or record.get(field) is None:
            continue
        step, loss = float(record["step"]), float(record[field])
        if math.isfinite(loss):
            found.append((step, loss))
    return found


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
