"""The charts of a study: an arm has one colour (Okabe and Ito's), one shape and one dash on the whole page.

Every chart is 340 units wide: three stand side by side on a screen, one on a phone, with text as large as the page's.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from fluxflow_train.reports import charts
from fluxflow_train.reports.charts import Axis, polyline

WIDTH, HEIGHT = 340, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 328, 10, 198
AIR = 1.3  # of a logarithmic axis, either side
SHADES = 8
# Of unit size, in the order of the arms; the colours repeat after seven, the shapes after twelve.
SHAPES = (
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
    "M-.9-.9H.9V.9H-.9Z",
    "M0-1.2L1.1.8H-1.1Z",
    "M0-1.3L1.2 0L0 1.3L-1.2 0Z",
    "M0 1.2L1.1-.8H-1.1Z",
    "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
    "M0-1.3L.38-.42L1.3-.4L.6.2L.82 1.1L0 .6L-.82 1.1L-.6.2L-1.3-.4L-.38-.42Z",
    "M-1.2-.65L-.65-1.2L0-.55L.65-1.2L1.2-.65L.55 0L1.2.65L.65 1.2L0 .55L-.65 1.2L-1.2.65L-.55 0Z",
    "M1.2 0L-.8 1.1V-1.1Z",
    "M-1.2 0L.8 1.1V-1.1Z",
    "M-1-1H1L-1 1H1Z",
    "M-1-1L1 1V-1L-1 1Z",
)


class Line(NamedTuple):
    """A line of a chart; `low` and `high` bound its band, `ring` is the x of a point to be ringed."""

    arm: int
    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    ring: float | None = None


def colour(arm: int) -> str:
    return f"a{arm % len(SHAPES)}"


def mark(arm: int, x: float, y: float, size: float, *, kind: str = "", title: str = "") -> str:
    """The shape of an arm at a place; `title` is read out under the pointer."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    place = f"translate({x:g} {y:g}) scale({size:g})"
    return f'<path class="mk {kind} {colour(arm)}" d="{SHAPES[arm % len(SHAPES)]}" transform="{place}">{inside}</path>'


def key(arm: int) -> Markup:
    """What stands for an arm in a legend: its line and its shape."""
    body = f'<path class="line {colour(arm)}" d="M1 7H27"/>{mark(arm, 14, 7, 4)}'
    return Markup(f'<svg class="key" viewBox="0 0 28 14" aria-hidden="true">{body}</svg>')


def log_axis(values: Sequence[float]) -> Axis:
    return Axis(min(values) / AIR, max(values) * AIR, LEFT, RIGHT, log=True)


def log_ticks(axis: Axis) -> list[float]:
    """1, 2, 5 of every decade; fewer where that were more than five."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in powers for d in digits if axis.low <= d * 10.0**p <= axis.high]
        if len(found) <= charts.TICKS:
            break
    if len(found) < 2:
        return axis._replace(log=False).ticks()[::2]
    return found[:: math.ceil(len(found) / charts.TICKS)]


def reach(core: Sequence[float], ends: Sequence[float | None], share: float) -> tuple[float, float]:
    """A range that holds `core` and as much of the interval ends as `share` of its width allows on either side."""
    low, high = min(core), max(core)
    span = high - low or 0.2 * abs(high) or 1.0
    finite = [end for end in ends if end is not None]
    return charts.padded(max(min([low, *finite]), low - share * span), min(max([high, *finite]), high + share * span))


def whisker(axis: Axis, low: float | None, high: float | None, across: float, *, upright: bool, css: str) -> str:
    """An interval along `axis`: an end that has no bound, or that lies outside of the chart, is an arrow."""
    forward = math.copysign(1, axis.end - axis.start)
    ends, strokes = [], []
    for value, limit, side in ((low, axis.start, -forward), (high, axis.end, forward)):
        at = limit if value is None else axis(min(max(value, axis.low), axis.high))
        ends.append(at)
        if value is not None and axis.low <= value <= axis.high:
            strokes.append([(at, across - 3), (at, across + 3)])
        elif at == limit:
            strokes.append([(at - 5 * side, across - 3.5), (at, across), (at - 5 * side, across + 3.5)])
    strokes.append([(ends[0], across), (ends[1], across)])
    return "".join(
        f'<path class="whisker {css}" d="{polyline([p[::-1] for p in stroke] if upright else stroke)}"/>'
        for stroke in strokes
    )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places moved as little as it takes to be `gap` apart, in their order; equal ones keep the order given."""
    groups: list[list[int]] = []
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        groups.append([i])
        while len(groups) > 1 and first(groups[-1], places, gap) < first(groups[-2], places, gap) + gap * len(
            groups[-2]
        ):
            last = groups.pop()
            groups[-1] += last
    moved = [0.0] * len(places)
    for group in groups:
        for rank, i in enumerate(group):
            moved[i] = first(group, places, gap) + rank * gap
    return moved


def first(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    """Where the first of a group stands, the group as a whole being centred on its places."""
    return sum(places[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def quality(
    cells: Sequence[dict[str, Any]],
    seeds: dict[int, list[tuple[str, float]]],
    lines: Sequence[dict[str, Any]],
    arms: dict[str, int],
    *,
    field: str,
    x_label: str,
    y_label: str,
    plain: bool = False,
) -> Markup | None:
    """The mean of every cell with its interval over `field`, the seeds (by the cell's place) beside it, fitted lines.

    `plain`: the means alone, for many arms. None where no cell has both a mean and a cost.
    """
    known = [i for i, cell in enumerate(cells) if cell["mean"] is not None and (cell.get(field) or 0) > 0]
    if not known:
        return None
    values = [v for i in known for v in (cells[i]["mean"], *(value for _, value in seeds[i] if not plain))]
    ends = [cells[i][end] for i in known for end in ("low", "high") if not plain]
    y = Axis(*reach(values, ends, 0.35), BOTTOM, TOP)
    x = log_axis([cells[i][field] for i in known])
    parts = [charts.frame(x, y, x_label, y_label, log_ticks(x))]
    parts += [fitted(line, x, y, arms[line["arm"]]) for line in lines]
    parts += [] if lines else joined([cells[i] for i in known], field, x, y, arms)
    known.sort(key=lambda i: arms[cells[i]["arm"]])
    gap = 0.0 if plain else min(8.0, (RIGHT - LEFT) / (len(known) + 1))
    for i, place in zip(known, apart([x(cells[i][field]) for i in known], gap), strict=True):
        cell, arm = cells[i], arms[cells[i]["arm"]]
        across = place + 0.3 * gap
        text = f"{cell['arm']}, {cell['size']}: mean {cell['mean']:.5g} of {cell['n']}, {x_label} {cell[field]:.4g}"
        if not plain:
            parts += [
                mark(arm, place - 0.45 * gap, y(value), 2.2, kind="seed", title=f"{run}: {value:.5g}")
                for run, value in seeds[i]
            ]
        if not plain and (cell["low"] is not None or cell["high"] is not None):
            parts.append(whisker(y, cell["low"], cell["high"], across, upright=True, css=colour(arm)))
        parts.append(mark(arm, across, y(cell["mean"]), 4, title=text))
    return charts.svg("".join(parts), f"{y_label} against {x_label}", size=(WIDTH, HEIGHT))


def joined(cells: Sequence[dict[str, Any]], field: str, x: Axis, y: Axis, arms: dict[str, int]) -> list[str]:
    """A thin line through the means of every arm, where nothing was fitted."""
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        points.setdefault(cell["arm"], []).append((x(cell[field]), y(cell["mean"])))
    return [f'<path class="line thin {colour(arms[a])}" d="{polyline(sorted(p))}"/>' for a, p in points.items()]


def fitted(line: dict[str, Any], x: Axis, y: Axis, arm: int) -> str:
    """A fitted line, straight over the logarithm, cut where it would leave the chart."""
    points = sorted((a, b) for a, b in zip(line["x"], line["y"], strict=True) if a > 0)
    places = [(x(a), y(b)) for a, b in points]
    inside: list[tuple[float, float]] = []
    for (a, b), (c, d) in pairwise(places):
        steps = [(a + (c - a) * k / 48, b + (d - b) * k / 48) for k in range(49)]
        inside += [(round(p, 2), round(q, 2)) for p, q in steps if LEFT <= p <= RIGHT and TOP <= q <= BOTTOM]
    ends = [inside[0], inside[-1]] if inside else []
    return f'<path class="line fit {colour(arm)}" d="{polyline(ends)}"/>' if ends else ""


def lines_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, log_x: bool = False, marked: bool = False, share: bool = False
) -> Markup | None:
    """Lines with their bands, the shape of the arm at the end or at every point; None where there is no line.

    `share`: the values are percentages, their axis starts at 0.
    """
    lines = [line for line in lines if line.x]
    if not lines:
        return None
    every = [v for line in lines for v in line.x]
    x = log_axis(every) if log_x else Axis(min(0.0, *every), 1.03 * max(every) or 1.0, LEFT, RIGHT)
    values = [v for line in lines for v in line.y]
    y = (
        Axis(0, 1.08 * max(1.0, *values), BOTTOM, TOP)
        if share
        else charts.value_axis(values)._replace(start=BOTTOM, end=TOP)
    )
    bands, strokes, marks = [], [], []
    for line in lines:
        css = colour(line.arm)
        if line.low != line.high:
            sides = [[(x(a), y(min(max(b, y.low), y.high))) for a, b in zip(line.x, side, strict=True)]
                     for side in (line.high, line.low)]  # fmt: skip
            bands.append(f'<path class="band {css}" d="{polyline(sides[0] + sides[1][::-1])}Z"/>')
        points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
        strokes.append(f'<path class="line {css}" d="{polyline(points)}"/>')
        for i, (a, b) in enumerate(points):
            if marked or i == len(points) - 1:
                text = f"{line.name}: {line.y[i]:.5g} at {line.x[i]:.5g}"
                marks.append(mark(line.arm, a, b, 3.4, title=text))
            if line.ring is not None and math.isclose(line.x[i], line.ring):
                marks.append(f'<circle class="ring {css}" cx="{a}" cy="{b}" r="7.5"/>')
    frame = charts.frame(x, y, x_label, y_label, log_ticks(x) if log_x else None)
    body = frame + "".join(bands + strokes + marks)
    return charts.svg(body, f"{y_label} against {x_label}", read_out(lines, x, y, x_label), (WIDTH, HEIGHT))


def read_out(lines: Sequence[Line], x: Axis, y: Axis, x_label: str) -> dict[str, Any]:
    """What the pointer shows."""
    series = [{"name": line.name, "class": colour(line.arm), "x": line.x, "y": line.y} for line in lines]
    span = {"x": [x.low, x.high], "y": [y.low, y.high], "log": y.log, "log_x": x.log}
    return span | {"box": [LEFT, RIGHT, TOP, BOTTOM], "x_label": x_label, "unit": "", "series": series}


def density(entry: dict[str, Any]) -> Markup:
    """How often (t, B(t)) falls where, shaded by the square root of the count; `counts` is by t, then by y."""
    t, edges = entry["t_edges"], entry["y_edges"]
    x, y = Axis(t[0], t[-1], LEFT, RIGHT), Axis(edges[0], edges[-1], BOTTOM, TOP)
    most = max((n for row in entry["counts"] for n in row), default=0) or 1
    shades: list[list[str]] = [[] for _ in range(SHADES + 1)]
    for i, row in enumerate(entry["counts"]):
        for j, n in enumerate(row):
            box = f"M{x(t[i])} {y(edges[j])}H{x(t[i + 1])}V{y(edges[j + 1])}H{x(t[i])}Z"
            shades[math.ceil(SHADES * math.sqrt(n / most))].append(box)
    heat = "".join(
        f'<path class="heat" style="opacity:{k / SHADES:g}" d="{"".join(boxes)}"/>'
        for k, boxes in enumerate(shades)
        if k and boxes
    )
    frame = charts.frame(x, y, "t", "B(t)")
    return charts.svg(frame + heat, f"Density of t and B(t) of {entry['name']}", size=(WIDTH, HEIGHT))
