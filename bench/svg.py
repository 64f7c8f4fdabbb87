"""Plots as SVG text: lines, dots and bars over two axes. No figures, no files, no libraries.

A plot is white with dark letters wherever it is shown. It draws what it is given; what is drawn is
`bench.plots`'s to say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
COLOURS = ("#1f6fb4", "#d95f02", "#2a9d5c", "#8a4fb0", "#666666")
_NUM_TICKS = 6


class Kind(StrEnum):
    LINE = "line"
    DOTS = "dots"
    BARS = "bars"


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) with a name for the key."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: Kind = Kind.LINE


@dataclass(frozen=True, slots=True)
class Plot:
    """`x_names` stand below the places 0, 1, 2 … instead of numbers."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log_x: bool = False
    x_names: Sequence[str] = ()
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)  # upright lines at x

    def as_svg(self) -> str:
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12" fill="#222">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            _text(LEFT, 18, self.title, size=14),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_label, "middle"),
            f'<g transform="rotate(-90 14 {HEIGHT / 2})">'
            f"{_text(14, HEIGHT / 2, self.y_label, 'middle')}</g>",
            *self._axes(),
        ]
        for i, series in enumerate(self.series):
            parts += [*self._series(i, series), *self._key(i, series.name)]
        return "\n".join([*parts, "</svg>\n"])

    @property
    def _x_range(self) -> tuple[float, float]:
        if self.x_names:
            return -0.5, len(self.x_names) - 0.5
        xs = [x for series in self.series for x, _ in series.points]
        return (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs), min(xs) + 1)

    @property
    def _top(self) -> float:
        return max(y for series in self.series for _, y in series.points) * 1.05 or 1.0

    def _x(self, x: float) -> float:
        low, high = self._x_range
        if self.is_log_x:
            x, low, high = math.log(x), math.log(low), math.log(high)
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def _y(self, y: float) -> float:
        return HEIGHT - BOTTOM - y / self._top * (HEIGHT - TOP - BOTTOM)

    def _axes(self) -> list[str]:
        parts = []
        for y in ticks(0, self._top):
            parts.append(_line(LEFT, self._y(y), WIDTH - RIGHT, self._y(y), "#ddd"))
            parts.append(_text(LEFT - 6, self._y(y) + 4, f"{y:g}", "end"))
        below = HEIGHT - BOTTOM + 16
        for i, name in enumerate(self.x_names):
            parts.append(_text(self._x(i), below, name, "middle"))
        for x in () if self.x_names else self._x_ticks():
            parts.append(_text(self._x(x), below, f"{x:g}", "middle"))
        for i, (at, name) in enumerate(self.marks):
            x = self._x(at)
            is_left = x > WIDTH / 2  # of its line, where there is room
            parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, "#999"))
            side = (x - 3, "end") if is_left else (x + 3, "start")
            parts.append(_text(side[0], TOP + 12 + 14 * i, name, side[1]))
        return [*parts, _line(LEFT, self._y(0), WIDTH - RIGHT, self._y(0), "#222")]

    def _x_ticks(self) -> list[float]:
        low, high = self._x_range
        if not self.is_log_x:
            return ticks(low, high)
        return [10.0**n for n in range(-9, 9) if low <= 10.0**n <= high] or [low, high]

    def _series(self, i: int, series: Series) -> list[str]:
        colour = COLOURS[i % len(COLOURS)]
        at = [(self._x(x), self._y(y)) for x, y in series.points]
        match series.kind:
            case Kind.LINE:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
                return [
                    f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
                ]
            case Kind.DOTS:
                return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in at]
            case Kind.BARS:
                each = (self._x(1) - self._x(0)) * 0.8 / len(self.series)
                shift = (i - len(self.series) / 2) * each
                return [
                    f'<rect x="{x + shift:.1f}" y="{y:.1f}" width="{each:.1f}" '
                    f'height="{self._y(0) - y:.1f}" fill="{colour}"/>'
                    for x, y in at
                ]

    def _key(self, i: int, name: str) -> list[str]:
        x = LEFT + 6 + i * (WIDTH - LEFT - RIGHT) / max(4, len(self.series))
        colour = COLOURS[i % len(COLOURS)]
        return [
            f'<rect x="{x:.0f}" y="{TOP - 14}" width="10" height="10" fill="{colour}"/>',
            _text(x + 14, TOP - 5, name),
        ]


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers in [low, high]: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'
