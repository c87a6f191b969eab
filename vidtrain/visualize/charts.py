"""Numbers as pictures for a web page: line charts as SVG, a confusion matrix as a small PNG.

Colours come from the page's style sheet (classes `s0` to `s7`), so that a chart follows the
reader's light or dark theme.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 214, 46, 10, 10, 30
COLOURS = 8  # of lines; from the ninth on they are dashed
MOST_POINTS = 240  # of one line: what its pixels can show
RIGHT_COLOUR, WRONG_COLOUR = (58, 134, 190), (222, 110, 45)  # seen on white and on black


class Point(NamedTuple):
    """One logged value."""

    step: int
    value: float
    epoch: int | None = None


class Plane(NamedTuple):
    """What part of the numbers the drawing shows, and where in it a number lies."""

    first: float  # step at the left edge
    last: float
    bottom: float  # value at the lower edge
    top: float

    def x(self, step: float) -> float:
        """Place a step, in the drawing's units from the left."""
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Place a value, in the drawing's units from the top."""
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, series: Mapping[str, Sequence[Point]], *, percent: bool = False) -> str:
    """Draw lines over training steps, as a `<figure>` with its own legend.

    A line of more than 240 points is drawn as the means of equal runs of them. The numbers lie
    beside the drawing as JSON, from where the page's script takes what the pointer is at.

    Args:
        title: heading of the chart.
        series: points of each line in order of step; values that are not finite are left out.
        percent: whether values are shares of one, to be shown in hundredths.

    Returns:
        The figure, or nothing at all when there is no finite value.
    """
    lines = {
        name: _thinned([point for point in points if math.isfinite(point.value)])
        for name, points in series.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    axes, plane = _axes([point for points in lines.values() for point in points], percent)
    number = {name: i for i, name in enumerate(series)}  # a line left out leaves its colour free
    drawn = "".join(_line(points, plane, number[name]) for name, points in lines.items())
    legend = "".join(
        f"<li>{key(number[name])}{escape(name)} <output>{_value(points[-1].value, percent)}</output></li>"
        for name, points in lines.items()
    )
    data = [
        [
            [
                round(plane.x(point.step), 1),
                round(plane.y(point.value), 1),
                point.step,
                _value(point.value, percent),
                point.epoch,
            ]
            for point in points
        ]
        for points in lines.values()
    ]
    spoken = "; ".join(
        f"{name} goes from {_value(points[0].value, percent)} at step {points[0].step:,} "
        f"to {_value(points[-1].value, percent)} at step {points[-1].step:,}"
        for name, points in lines.items()
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        f'<ul class="legend">{legend}</ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {spoken}")}">'
        f'{axes}{drawn}<g class="cursor"></g></svg>'
        f'<p class="at">{_last_step(lines)}</p>'
        f'<script type="application/json">{as_json(data)}</script></figure>'
    )


def key(line: int) -> str:
    """Draw the little line of a legend, in the colour of the line of this number."""
    return (
        '<svg class="key" viewBox="0 0 16 10" aria-hidden="true">'
        f'<path class="line {_style(line)}" d="M1,5H15"/></svg>'
    )


def _style(line: int) -> str:
    return f"s{line % COLOURS}" + (" dashed" if line // COLOURS % 2 else "")


def heat_map(counts: np.ndarray) -> bytes:
    """Paint a confusion matrix, one pixel a cell, as a PNG with transparent zeros.

    `(K, K)` counts, rows true and columns predicted. Strength is the share of the row; right
    answers and wrong ones have a colour each. Even the faintest mistake stays visible.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    faintest = min(0.7, 0.3 + len(counts) / 1000)  # the smaller a cell, the stronger its colour
    strength = np.where(share > 0, faintest + (1 - faintest) * np.sqrt(share), 0)
    pixels = np.empty((*counts.shape, 4), dtype=np.uint8)
    pixels[..., :3] = WRONG_COLOUR
    pixels[np.eye(len(counts), dtype=bool), :3] = RIGHT_COLOUR
    pixels[..., 3] = np.round(255 * strength)
    out = io.BytesIO()
    Image.fromarray(pixels, mode="RGBA").save(out, format="PNG", optimize=True)
    return out.getvalue()


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Choose about `count` round numbers that cover `low` to `high`; `whole`: integers only."""
    span = (high - low) or abs(high) or 1.0  # values that are all one number still get an axis
    rough = span / max(1, count - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def short(number: float) -> str:
    """Write a step count briefly: 950, 1.5k, 2M."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def as_json(data: object) -> str:
    """Write JSON that cannot end the `<script>` element it lies in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _axes(points: Sequence[Point], percent: bool) -> tuple[str, Plane]:
    """Draw grid, axis and numbers around the points; zero is always in sight."""
    steps, values = [point.step for point in points], [point.value for point in points]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    y_ticks = ticks(min(0.0, *values), max(0.0, *values), 5)
    plane = Plane(first, last, y_ticks[0], y_ticks[-1])
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    svg = []
    for tick, name in zip(y_ticks, _tick_names(y_ticks, percent), strict=True):
        at = f"{plane.y(tick):.1f}"
        svg.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        svg.append(f'<text x="{LEFT - 7}" y="{plane.y(tick) + 4:.1f}" class="end">{name}</text>')
    for tick in ticks(first, last, 5, whole=True):
        if first <= tick <= last:
            at = f"{plane.x(tick):.1f}"
            svg.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{floor}" y2="{floor + 4}"/>')
            svg.append(f'<text x="{at}" y="{floor + 18}" class="middle">{short(tick)}</text>')
    svg.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    return "".join(svg), plane


def _line(points: Sequence[Point], plane: Plane, colour: int) -> str:
    """Draw one line, with its points where they are few."""
    at = [(plane.x(point.step), plane.y(point.value)) for point in points]
    svg = (
        f'<path class="line {_style(colour)}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'
    )
    if len(points) <= 30:
        for x, y in at:
            svg += f'<circle class="dot s{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
    return svg


def _thinned(points: list[Point]) -> list[Point]:
    """Replace equal runs of points by their means, until the line has few enough."""
    run = -(-len(points) // MOST_POINTS)
    if run <= 1:
        return points
    parts = [points[i : i + run] for i in range(0, len(points), run)]
    return [
        Point(part[-1].step, sum(p.value for p in part) / len(part), part[-1].epoch)
        for part in parts
    ]


def _tick_names(values: Sequence[float], percent: bool) -> list[str]:
    """Write an axis' numbers, all with the decimals that tell them apart."""
    scaled = [value * 100 for value in values] if percent else list(values)
    largest = max(abs(value) for value in scaled)
    if not percent and 0 < largest < 0.001:
        return [f"{value:.2g}" for value in scaled]
    gap = min((b - a for a, b in pairwise(scaled)), default=1.0)
    decimals = next((d for d in range(7) if abs(gap * 10**d - round(gap * 10**d)) < 1e-6), 6)
    return [f"{value:,.{decimals}f}{'%' if percent else ''}" for value in scaled]


def _value(value: float, percent: bool) -> str:
    """Write one value of a line."""
    if percent:
        return f"{100 * value:.1f}%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _last_step(lines: Mapping[str, Sequence[Point]]) -> str:
    """Say at which step the values of the legend stand until the pointer moves them."""
    last = max((points[-1] for points in lines.values()), key=lambda point: point.step)
    epoch = "" if last.epoch is None else f", epoch {last.epoch}"
    return f"step {last.step:,}{epoch}"
