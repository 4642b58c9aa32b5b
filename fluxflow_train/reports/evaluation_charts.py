"""The charts of an evaluation: a distance against 1/N, and every measure over the guidance scale."""

from typing import Any

from markupsafe import Markup

from fluxflow_train.reports import charts

MEASURES = ("frechet", "kid", "clip_score", "precision", "recall", "density", "coverage")
# What a scale trades: fidelity to the caption, or to real images, against variety.
FRONTS = (("clip_score", "frechet"), ("clip_score", "kid"), ("recall", "precision"))


def by_size(entry: dict[str, Any]) -> dict[str, Any]:
    """The distance of subsets over 1/N, and the line that meets the axis at endlessly many images."""
    points = sorted((1 / size, value) for size, value in zip(entry["sizes"], entry["values"], strict=True))
    ends = [0.0, points[-1][0]]
    series = {
        "subsets": line([x for x, _ in points], [y for _, y in points]),
        "fit": line(ends, [entry["intercept"] + entry["slope"] * x for x in ends]),
    }
    title = "Frechet distance against 1/N"
    if entry["guidance"] is not None:
        title += f", guidance {entry['guidance']:g}"
    return {"title": title, "names": list(series), "chart": chart(series, title, "1 / number of images")}


def over_guidance(points: list[dict[str, Any]], by_name: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A chart of each measure over guidance and, last, the front that the scales trace; [] where none was swept."""
    ordered = sorted(points, key=lambda point: point["guidance"])
    drawn = []
    for name in MEASURES:
        values = [point[name] for point in ordered]
        if ordered and None not in values:
            title = label(name, ordered[0], by_name)
            series = {title: line([point["guidance"] for point in ordered], values)}
            drawn.append({"title": title, "chart": chart(series, f"{title} against guidance", "guidance")})
    for across, up in FRONTS:
        if ordered and all(point[name] is not None for point in ordered for name in (across, up)):
            drawn.append(front(ordered, across, up, by_name))
            break
    return drawn


def front(ordered: list[dict[str, Any]], across: str, up: str, by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    x_label, y_label = (label(name, ordered[0], by_name) for name in (across, up))
    scales = f"{ordered[0]['guidance']:g} to {ordered[-1]['guidance']:g}"
    title = f"{y_label} against {x_label}, guidance {scales}"
    series = {y_label: line([point[across] for point in ordered], [point[up] for point in ordered])}
    return {"title": title, "chart": chart(series, title, x_label)}


def label(name: str, point: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> str:
    """The result's own words: the distance's name depends on the extractor."""
    return by_name[point.get(f"{name}_name", name)]["label"]


def line(x: list[float], y: list[float]) -> dict[str, list[float]]:
    return {"x": x, "y": y, "low": y, "high": y}


def chart(series: dict[str, dict[str, list[float]]], title: str, x_label: str) -> Markup:
    return charts.line_chart(series, title=title, x_label=x_label, unit="")
