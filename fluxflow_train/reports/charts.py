"""Inline SVG charts: axes with units, lines with their range, curves with control points. No library, no script needed.

Every chart is drawn in a box of WIDTH x HEIGHT units and scales with its card; colours are CSS classes.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 408, 14, 212
LOG_RATIO = 50
TICKS = 5


class Axis(NamedTuple):
    """Maps values in [low, high] to units in [start, end], straight or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log10(a) for a in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return round(self.start + (v - low) / (high - low) * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """About five round values inside the range."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(decades) >= 2:
                return [10.0**d for d in decades[:: math.ceil(len(decades) / (TICKS + 1))]]
        step = round_step((self.high - self.low) / TICKS)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def round_step(width: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten that is at least `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= width * (1 - 1e-9))


def short(value: float) -> str:
    """A tick's text: 1500 is 1.5k, 0.00002 is 2e-05."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def padded(low: float, high: float) -> tuple[float, float]:
    """The range with 4 % of air; a single value gets a range around it."""
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def value_axis(values: Sequence[float]) -> Axis:
    """A vertical axis; logarithmic where all values are positive and the middle 80 % span more than a factor of 50."""
    low, high = min(values), max(values)
    tenths = sorted(values)
    if low > 0 and tenths[-1 - len(values) // 10] / tenths[len(values) // 10] > LOG_RATIO:
        return Axis(low / 1.15, high * 1.15, BOTTOM, TOP, log=True)
    return Axis(*padded(low, high), BOTTOM, TOP)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> str:
    """Grid lines, tick texts and the two labels, around the box that the axes span."""
    left, right, bottom = x.start, x.end, y.start
    parts = []
    for v in y.ticks():
        parts.append(f'<path class="grid" d="M{left} {y(v)}H{right}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{y(v) + 3.5}" text-anchor="end">{short(v)}</text>')
    for v in x.ticks() if x_ticks is None else x_ticks:
        parts.append(f'<path class="axis" d="M{x(v)} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x(v)}" y="{bottom + 17}" text-anchor="middle">{short(v)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(f'<text class="label" x="{right}" y="{bottom + 34}" text-anchor="end">{escape(x_label)}</text>')
    text = ", ".join(part for part in (y_label, "log scale" if y.log else "") if part)
    parts.append(f'<text class="label" x="{left}" y="{bottom + 34}">{escape(f"↑ {text}" if text else "")}</text>')
    return "".join(parts)


def svg(
    body: str, title: str, data: dict[str, Any] | None = None, size: tuple[float, float] = (WIDTH, HEIGHT)
) -> Markup:
    """The element; `data` feeds the pointer's read-out."""
    attribute = f' data-chart="{escape(json.dumps(data))}"' if data is not None else ""
    return Markup(
        f'<svg class="chart" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(title)}"{attribute}>'
        f'{body}<g class="cursor"></g></svg>'
    )


def polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points)


def line_chart(series: dict[str, dict[str, list[float]]], *, title: str, x_label: str, unit: str) -> Markup:
    """Lines by name, each {x, y, low, high}; the range within each bin is a pale band behind its line."""
    every_x = [v for s in series.values() for v in s["x"]]
    y = value_axis([v for s in series.values() for v in s["y"]])
    x = Axis(min(0.0, *every_x), max(every_x) or 1.0, LEFT, RIGHT)
    bands, lines = [], []
    for i, s in enumerate(series.values()):
        inside: Callable[[float], float] = lambda v: min(max(v, y.low), y.high)  # noqa: E731
        upper = [(x(a), y(inside(b))) for a, b in zip(s["x"], s["high"], strict=True)]
        lower = [(x(a), y(inside(b))) for a, b in zip(s["x"], s["low"], strict=True)]
        if any(a != b for a, b in zip(s["low"], s["high"], strict=True)):
            bands.append(f'<path class="band c{i}" d="{polyline(upper + lower[::-1])}Z"/>')
        points = [(x(a), y(b)) for a, b in zip(s["x"], s["y"], strict=True)]
        lines.append(f'<path class="line c{i}" d="{polyline(points)}"/>')
        if len(points) <= 40:
            lines += [f'<circle class="dot c{i}" cx="{a:g}" cy="{b:g}" r="2"/>' for a, b in points]
    data = {
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": y.log,
        "box": [LEFT, RIGHT, TOP, BOTTOM],
        "x_label": x_label,
        "unit": unit,
        "series": [{"name": name, "x": s["x"], "y": s["y"]} for name, s in series.items()],
    }
    return svg(frame(x, y, x_label, unit) + "".join(bands + lines), title, data)


def histogram(edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str, mark: float) -> Markup:
    """Bars of counts, with a line at `mark`."""
    x, y = Axis(edges[0], edges[-1], LEFT, RIGHT), Axis(0, 1.08 * max(counts), BOTTOM, TOP)
    bars = [
        f'<path class="bar" d="M{x(a) + 0.6:g} {BOTTOM}V{y(n)}H{max(x(a) + 1, x(b) - 0.6):g}V{BOTTOM}Z">'
        f"<title>{a:.1f} to {b:.1f}: {n}</title></path>"
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    ]
    near_end = x(mark) > RIGHT - 70
    anchor, offset = ("end", -5) if near_end else ("start", 5)
    bars.append(f'<path class="mark" d="M{x(mark)} {TOP - 6}V{BOTTOM}"/>')
    bars.append(
        f'<text class="label strong" x="{x(mark) + offset}" y="{TOP + 3}" text-anchor="{anchor}">mean {mark:.2f}</text>'
    )
    return svg(frame(x, y, x_label, "images") + "".join(bars), title)


def bezier_chart(entry: dict[str, Any], *, title: str) -> Markup:
    """Learned curves over t with their control points; behind them, where the t of real inputs lie."""
    y = Axis(*padded(*extremes([*entry["values"], *entry["points"]])), BOTTOM, TOP)
    x = Axis(0, 1, LEFT, RIGHT)
    parts = []
    counts = entry["t_histogram"]
    if counts and max(counts):
        height = (BOTTOM - TOP) * 0.45 / max(counts)
        steps = [(LEFT + (RIGHT - LEFT) * (i + side) / len(counts), BOTTOM - n * height)
                 for i, n in enumerate(counts) for side in (0, 1)]  # fmt: skip
        parts.append(f'<path class="density" d="M{LEFT} {BOTTOM}L{polyline(steps)[1:]}L{RIGHT} {BOTTOM}Z"/>')
    total = len(entry["values"])
    for i, (values, points) in enumerate(zip(entry["values"], entry["points"], strict=True)):
        colour = f"rgb{i}" if entry["num_channels"] == 3 else "mix"
        share = f"--share:{round(100 * i / max(total - 1, 1))}%"
        line = polyline([(x(t), y(v)) for t, v in zip(entry["t"], values, strict=True)])
        parts.append(f'<path class="line {colour}" style="{share}" d="{line}"/>')
        parts += [
            f'<circle class="knot {colour}" style="{share}" cx="{x(k / 3)}" cy="{y(p)}" r="2.6">'
            f"<title>channel {entry['channels'][i]}, p{k} = {p:.3g}</title></circle>"
            for k, p in enumerate(points)
        ]
    return svg(frame(x, y, "t = sigmoid(x)", "output") + "".join(parts), title)


def extremes(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    return min(map(min, rows)), max(map(max, rows))
