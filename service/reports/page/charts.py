"""Charts of the report, drawn by matplotlib as SVG that stands in the page itself.

Text stays text, so that it can be read aloud, searched and enlarged; no fonts are loaded. Colours
are those of Okabe and Ito, told apart by colour-blind readers, and shapes tell the same.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.reports.trade_picture import Point, front

WIDTH_IN, HEIGHT_IN = 5.6, 3.8
"""Narrow, so that text stays legible when a phone shrinks the picture."""
BLUE, RED, GREY = "#0072b2", "#b3400a", "#555555"
MAX_CURVES = 8
MAX_POINTS = 300
FAR_OFF = 8.0
"""Scores above the best by more than this many times the median's distance are drawn at the edge.
"""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "caddie",
    "text.parse_math": False,  # a study may be called $x$
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
}


@dataclass(frozen=True)
class Curve:
    """The training loss of one trial."""

    trial: int
    seconds: list[float]
    losses: list[float]
    """Nats per token."""
    is_feasible: bool


def trade_chart(points: Sequence[Point], cap: int | None) -> str:
    """Bytes against bits per byte, the front as a line, the cap as another; "" below two points."""
    if len(points) < 2:
        return ""
    best = min(point.bpb for point in points)
    usual = sorted(point.bpb - best for point in points)[len(points) // 2]
    highest = best + FAR_OFF * usual if usual > 0 else math.inf
    shown = [min(point.bpb, highest) for point in points]

    def paint(axes: Any) -> None:
        for fits, colour, marker, label in (
            (True, BLUE, "o", "feasible"),
            (False, RED, "X", "breaks a constraint"),
        ):
            some = [
                (p.num_bytes, y)
                for p, y in zip(points, shown, strict=True)
                if p.is_feasible == fits
            ]
            if some:
                axes.scatter(*zip(*some, strict=True), c=colour, marker=marker, s=45, label=label)
        line = front(points)
        if line:
            axes.step(
                [p.num_bytes for p in line], [p.bpb for p in line], where="post", color=BLUE, lw=1.5
            )
        for point in line[-6:]:
            axes.annotate(
                str(point.trial), (point.num_bytes, point.bpb), (5, 6), textcoords="offset points"
            )
        if cap is not None and cap < 1.5 * max(point.num_bytes for point in points):
            axes.axvline(cap, color=RED, ls="--", lw=1.5, label=f"cap {cap:,}")
        axes.set_xlabel("bytes: code and model")
        axes.set_ylabel("bits per byte")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(_ticks(4))
        axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(0, 1.2), ncols=3)

    lowest = min(points, key=lambda point: point.bpb)
    words = (
        f"Bytes against bits per byte of {len(points)} artifacts; the lowest is trial "
        f"{lowest.trial} with {lowest.bpb:.4f} at {lowest.num_bytes:,} bytes"
    )
    return _svg(paint, words)


def curve_chart(curves: Sequence[Curve]) -> str:
    """Training loss against seconds of the budget clock; "" without curves."""
    drawn = [curve for curve in curves if len(curve.seconds) > 1]
    if not drawn:
        return ""

    def paint(axes: Any) -> None:
        for place, curve in enumerate(drawn[:MAX_CURVES]):
            every = max(1, len(curve.seconds) // MAX_POINTS)
            axes.plot(
                curve.seconds[::every],
                curve.losses[::every],
                lw=2.4 if place == 0 else 1.2,
                color=BLUE if place == 0 else None,
                ls="-" if curve.is_feasible else ":",
                label=f"trial {curve.trial}",
            )
        losses = sorted(loss for curve in drawn for loss in curve.losses)
        axes.set_ylim(top=losses[int(0.98 * (len(losses) - 1))] * 1.02)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("training loss, nats")
        axes.legend(frameon=False, fontsize=9, ncols=2)

    return _svg(paint, f"Training loss against seconds of {len(drawn[:MAX_CURVES])} trials")


def importance_chart(importances: dict[str, float]) -> str:
    """Shares of the score's variance, by setting; "" without any."""
    if not importances:
        return ""
    rows = sorted(importances.items(), key=lambda item: item[1])[-10:]

    def paint(axes: Any) -> None:
        axes.barh([path for path, _ in rows], [share for _, share in rows], color=BLUE)
        for place, (_, share) in enumerate(rows):
            axes.annotate(f"{share:.0%}", (share, place), (4, -4), textcoords="offset points")
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("share of the variance")
        axes.grid(axis="y", visible=False)

    words = ", ".join(f"{path} {share:.0%}" for path, share in reversed(rows))
    return _svg(paint, f"Importance of settings: {words}", height=1.4 + 0.4 * len(rows))


def _ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _svg(paint: Callable[[Any], None], label: str, height: float = HEIGHT_IN) -> str:
    """An <svg> element, named for people who do not see it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _standing_in_html(file.getvalue(), label)


def _standing_in_html(document: str, label: str) -> str:
    from markupsafe import escape

    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
