"""Intervals under each other: paired differences around 0 with the margin of equivalence, size ratios around 1."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from fluxflow_train.reports import charts
from fluxflow_train.reports.charts import Axis
from fluxflow_train.reports.study_charts import WIDTH, colour, mark, reach, whisker

LEFT, RIGHT = 12, 328
ROW, TOP = 36, 8
APART = 60  # units that the two labels above the ratios need between their middles
LETTERS = 44  # that fit into a row, its label and its value together
CLAIM = (2.0, 2.5)  # the size ratio that the authors of the family claim
WIDEST = 16.0  # the largest ratio that an axis shows; beyond it, intervals are arrows


class Row(NamedTuple):
    """An estimate with its interval. `text` is written at the right; hollow marks are not significant."""

    arm: int
    label: str
    estimate: float | None
    low: float | None
    high: float | None
    text: str
    solid: bool = True


def differences(rows: Sequence[Row], margin: float | None, span: tuple[float, float], x_label: str) -> Markup:
    """Differences on a common axis `span`; 0 is a line, differences within the margin lie on the band."""
    axis = Axis(*span, LEFT, RIGHT)
    bottom = TOP + ROW * len(rows) + 4
    back = ""
    if margin:
        a, b = (axis(min(max(v, axis.low), axis.high)) for v in (-margin, margin))
        back = f'<path class="margin" d="M{a} {TOP}H{b}V{bottom}H{a}Z"/>'
    back += f'<path class="zero" d="M{axis(0)} {TOP}V{bottom}"/>'
    return forest(rows, axis, bottom, back, x_label, axis.ticks())


def span_of(rows: Sequence[Row], margin: float | None) -> tuple[float, float]:
    """One axis for several charts of differences."""
    core = [0.0, margin or 0.0, -(margin or 0.0), *(row.estimate for row in rows if row.estimate is not None)]
    return reach(core, [end for row in rows for end in (row.low, row.high)], 2.0)


def ratios(rows: Sequence[Row], x_label: str) -> Markup:
    """Size ratios on a logarithmic axis: 1 is a line, the ratios of the claim are a band."""
    inside = [v for row in rows for v in (row.estimate, row.low, row.high) if v and 1 / WIDEST <= v <= WIDEST]
    axis = Axis(min([0.8, *inside]) / 1.2, max([*CLAIM, *inside]) * 1.2, LEFT, RIGHT, log=True)
    top, bottom = TOP + 14, TOP + 14 + ROW * len(rows) + 4
    a, b, one = axis(CLAIM[0]), axis(CLAIM[1]), axis(1)
    near = (a + b) / 2 - one < APART  # then one label gives way
    back = (
        f'<path class="claim" d="M{a} {top}H{b}V{bottom}H{a}Z"/>'
        f'<path class="edge" d="M{a} {top}V{bottom}M{b} {top}V{bottom}"/>'
        f'<text class="label" x="{(a + b) / 2:g}" y="{top - 5}" text-anchor="middle">claim</text>'
        f'<path class="zero" d="M{one} {top}V{bottom}"/>'
        f'<text class="label" x="{one}" y="{top - 5}" text-anchor="{"end" if near else "middle"}">same size</text>'
    )
    ticks = [m * 2.0**k for k in range(-5, 6) for m in (1, 1.5) if axis.low * 1.1 <= m * 2.0**k <= axis.high]
    ticks = ticks if len(ticks) <= charts.TICKS else [tick for tick in ticks if math.log2(tick).is_integer()]
    return forest(rows, axis, bottom, back, x_label, ticks, top)


def forest(
    rows: Sequence[Row], axis: Axis, bottom: float, back: str, x_label: str, ticks: Sequence[float], top: float = TOP
) -> Markup:
    """The rows over `back`: label and value on one line, the interval under them."""
    parts = [back, f'<path class="axis" d="M{LEFT} {bottom}H{RIGHT}"/>']
    for tick in ticks:
        parts.append(f'<path class="axis" d="M{axis(tick)} {bottom}v4"/>')
        text = charts.short(tick).replace("-", "−")
        parts.append(f'<text class="tick" x="{axis(tick)}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    parts.append(f'<text class="label" x="{RIGHT}" y="{bottom + 33}" text-anchor="end">{escape(x_label)}</text>')
    for i, row in enumerate(rows):
        y = top + ROW * i
        parts.append(f'<text class="label strong halo" x="{LEFT}" y="{y + 14}">{escape(shortened(row))}</text>')
        parts.append(f'<text class="label halo" x="{RIGHT}" y="{y + 14}" text-anchor="end">{escape(row.text)}</text>')
        if row.estimate is not None:
            parts.append(whisker(axis, row.low, row.high, y + 26, upright=False, css=colour(row.arm)))
        if row.estimate is not None and axis.low <= row.estimate <= axis.high:
            kind = "" if row.solid else "hollow"
            title = f"{row.label}: {row.text}"
            parts.append(mark(row.arm, axis(row.estimate), y + 26, 4, kind=kind, title=title))
    return charts.svg("".join(parts), x_label, size=(WIDTH, bottom + 38))


def shortened(row: Row) -> str:
    """The label, cut where it would meet the value."""
    room = max(8, LETTERS - math.ceil(1.05 * len(row.text)))
    return row.label if len(row.label) <= room else f"{row.label[: room - 1]}…"
