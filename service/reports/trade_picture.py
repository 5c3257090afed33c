"""What bytes buy: a picture of a study's artifacts by size and score, drawn as SVG by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from service.reports.study_view import TrialView

FILE = "bytes_against_loss.svg"
WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 44, 64
NUM_TICKS = 5
GOOD, BAD = "#1f6feb", "#d1242f"
FAR_OFF = 8.0
"""Scores further above the best than this many times the median's distance are drawn at the upper
edge, hollow, so that one of them does not press all others onto a line."""


Place = Callable[[float, float], tuple[float, float]]
"""(bytes, bits per byte) -> where in the picture."""


@dataclass(frozen=True)
class Point:
    """A measured artifact."""

    trial: int
    num_bytes: int
    """Packed code plus packed model."""
    bpb: float
    """Bits per byte of the artifact as read back."""
    is_feasible: bool


def write_trade(trials: Sequence[TrialView], cap: int | None, folder: Path) -> Path | None:
    """Draw the measured trials into FOLDER/bytes_against_loss.svg; None below two of them.

    Args:
        cap: The bytes that an artifact may have; None = no cap.
    """
    points = points_of(trials)
    if len(points) < 2:
        return None
    before = {t.result.val_bpb_prequant for t in trials if t.result is not None}
    unquantised = before.pop() if len(before) == 1 else None
    path = folder / FILE
    path.write_text(draw_trade(points, cap, unquantised, f"{folder.name}: bytes against loss"))
    return path


def points_of(trials: Sequence[TrialView]) -> list[Point]:
    """The measured artifacts of trials."""
    return [point for trial in trials if (point := _point(trial)) is not None]


def front(points: Sequence[Point]) -> list[Point]:
    """The feasible points that no other is at least as small and as good as, by size."""
    best, found = math.inf, []
    feasible = [point for point in points if point.is_feasible]
    for point in sorted(feasible, key=lambda point: (point.num_bytes, point.bpb)):
        if point.bpb < best:
            best = point.bpb
            found.append(point)
    return found


def draw_trade(
    points: Sequence[Point], cap: int | None, unquantised: float | None, title: str
) -> str:
    """An SVG: a dot for each artifact, a line through those that nothing beats, trial numbers on
    it, and dashed lines for the cap and for the weights before quantisation, where all share them.

    Args:
        points: At least two.
    """
    shown = [point.num_bytes for point in points]
    is_cap_near = cap is not None and cap < 1.5 * max(shown)
    x_axis = Axis.over([*shown, cap] if cap is not None and is_cap_near else shown)
    lowest = min(point.bpb for point in points)
    usual = sorted(point.bpb - lowest for point in points)[len(points) // 2]
    highest = lowest + FAR_OFF * usual if usual > 0 else math.inf
    scores = [point.bpb for point in points if point.bpb <= highest]
    y_axis = Axis.over([*scores, unquantised] if unquantised is not None else scores)

    def place(num_bytes: float, bpb: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * x_axis.share(num_bytes)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, y_axis.share(bpb))
        return round(x, 1), round(y, 1)

    best = front(points)
    line = " ".join("{},{}".format(*place(point.num_bytes, point.bpb)) for point in best)
    parts = [_frame(x_axis, y_axis, place, title)]
    if cap is not None and is_cap_near:
        x, _ = place(cap, 0)
        parts.append(
            _dashed(f"M{x},{TOP}V{HEIGHT - BOTTOM}", x - 6, TOP + 14, f"cap {cap:,}", "end")
        )
    if unquantised is not None:
        _, y = place(0, unquantised)
        words = f"before quantisation {unquantised:.4f}"
        parts.append(_dashed(f"M{LEFT},{y}H{WIDTH - RIGHT}", LEFT + 8, y - 5, words, "start"))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{GOOD}" stroke-width="1.5"/>')
    parts += [_dot(point, place(point.num_bytes, point.bpb), highest) for point in points]
    parts += [_number(point, place(point.num_bytes, point.bpb)) for point in best]
    legend = ["hollow: higher still"] if len(scores) < len(points) else []
    legend += ["red: breaks a constraint"] if not all(p.is_feasible for p in points) else []
    if legend:
        words = ", ".join(legend)
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="24" text-anchor="end" fill="#555">{words}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


@dataclass(frozen=True)
class Axis:
    """A range with round ticks."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Axis:
        """Wide enough for the values, from tick to tick."""
        low, high = min(values), max(values)
        spread = (high - low) or max(abs(high), 1.0)
        power = 10.0 ** math.floor(math.log10(spread / NUM_TICKS))
        step = next(m * power for m in (1, 2, 5, 10) if m * power * NUM_TICKS >= spread)
        first, last = math.floor(low / step), math.ceil(high / step)
        return cls(first * step, max(last, first + 1) * step, step)

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round numbers from end to end."""
        count = round((self.high - self.low) / self.step)
        return [self.low + self.step * index for index in range(count + 1)]

    @property
    def decimals(self) -> int:
        """Digits that tell neighbouring ticks apart."""
        return max(0, -math.floor(math.log10(self.step)))


def _point(trial: TrialView) -> Point | None:
    result = trial.result
    if trial.duplicate_of is not None or result is None or result.bytes_total is None:
        return None
    if result.val_bpb is None or not math.isfinite(result.val_bpb):
        return None
    return Point(trial.number, result.bytes_total, result.val_bpb, trial.is_feasible)


def _frame(x_axis: Axis, y_axis: Axis, place: Place, title: str) -> str:
    floor, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    marks = []
    for tick in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        marks.append(f'<path d="M{x},{TOP}V{floor}" stroke="#eee"/>')
        marks.append(f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{tick:,.0f}</text>')
    for tick in y_axis.ticks:
        _, y = place(x_axis.low, tick)
        marks.append(f'<path d="M{LEFT},{y}H{WIDTH - RIGHT}" stroke="#eee"/>')
        words = f"{tick:.{y_axis.decimals}f}"
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{words}</text>')
    return (
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(marks)}'
        f'<path d="M{LEFT},{TOP}V{floor}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>'
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>'
        f'<text x="{middle}" y="{HEIGHT - 18}" text-anchor="middle">bytes: code and model</text>'
        f'<text transform="translate(20 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        "bits per byte of the artifact</text>"
    )


def _dot(point: Point, at: tuple[float, float], highest: float) -> str:
    colour = GOOD if point.is_feasible else BAD
    fill = "white" if point.bpb > highest else colour
    words = f"trial {point.trial}: {point.num_bytes:,} bytes, {point.bpb:.4f} bits per byte"
    words += "" if point.is_feasible else ", breaks a constraint"
    return (
        f'<circle cx="{at[0]}" cy="{at[1]}" r="4.5" fill="{fill}" stroke="{colour}" '
        f'fill-opacity="0.75"><title>{words}</title></circle>'
    )


def _number(point: Point, at: tuple[float, float]) -> str:
    return f'<text x="{at[0] + 7}" y="{at[1] - 6}" fill="{GOOD}">{point.trial}</text>'


def _dashed(path: str, x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<path d="{path}" stroke="#777" stroke-dasharray="5 4" fill="none"/>'
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#555">{words}</text>'
    )
