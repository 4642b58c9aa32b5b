"""The charts of a study in their groups: quality over cost, training, tuning, health, learned curves; pictures."""

from collections.abc import Iterator, Sequence
from typing import Any

from fluxflow_train.reports import charts, study_charts
from fluxflow_train.reports.study_charts import Line

COSTS = {"parameters": "parameters", "flops": "FLOPs per image", "seconds": "seconds of training"}
LAYERS = (
    ("variance", "Activation variance"),
    ("grad_norm", "Gradient norm"),
    ("dead", "Dead units"),
    ("saturated", "Saturated"),
    ("outside", "t outside [0, 1]"),
)
CROWD = 6  # arms that a chart holds with their seeds and intervals


def y_label(report: dict[str, Any]) -> str:
    metric = report["metric"]
    return f"{metric['label']}, {metric['unit']}" if metric["unit"] else metric["label"]


def under(size: str | None, vae: str | None) -> str:
    """The heading of what belongs to one size and one VAE; "" where there is neither."""
    return ", ".join([f"Size {size}"] * (size is not None) + [f"VAE {vae}"] * (vae is not None))


def quality_panels(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For each VAE (or once): quality over every cost; the fitted lines stand where sizes are matched by that cost.

    Of many arms the means alone, and then the candidate with one other arm at a time.
    """
    label = report["axis"]["label"]
    costs = COSTS if label in COSTS.values() else COSTS | {"cost": label}
    matched = next(field for field, x_label in costs.items() if x_label == label)
    crowd = len(arms) > CROWD
    for vae in report["vaes"] or [None]:
        names = under(None, vae)
        fits = [r for r in report["ratios"] if r["vae"] == vae]
        plots = [
            quality_plot(report, arms, vae, field, x_label, fits if field == matched and not crowd else [], list(arms))
            for field, x_label in costs.items()
        ]
        yield {"title": names, "plots": [plot for plot in plots if plot["chart"]]}
        rivals = [name for name in arms if name != report["candidate"]] if crowd else []
        pairs = [
            quality_plot(
                report,
                arms,
                vae,
                matched,
                label,
                [r for r in fits if r["baseline"] == rival],
                [report["candidate"], rival],
            )
            | {"title": f"Beside {rival}"}
            for rival in rivals
        ]
        title = ": ".join(([names] if vae else []) + [f"{report['candidate']} beside one other arm, against {label}"])
        yield {"title": title, "plots": [plot for plot in pairs if plot["chart"]]}


def quality_plot(
    report: dict[str, Any],
    arms: dict[str, int],
    vae: str | None,
    field: str,
    x_label: str,
    fits: Sequence[dict[str, Any]],
    shown: Sequence[str],
) -> dict[str, Any]:
    """Quality of the arms `shown` over one cost, with the lines of the ratios `fits`."""
    cells = [cell for cell in report["cells"] if cell["vae"] == vae and cell["arm"] in shown]
    seeds = {i: seeds_of(report, cell) for i, cell in enumerate(cells)}
    lines = [line for fit in fits for line in fit["lines"]]
    words = {"field": field, "x_label": x_label, "y_label": y_label(report)}
    chart = study_charts.quality(cells, seeds, lines, arms, plain=len(shown) > CROWD, **words)
    return {"title": f"Against {x_label}", "chart": chart}


def seeds_of(report: dict[str, Any], cell: dict[str, Any]) -> list[tuple[str, float]]:
    """The runs of a cell and what each measured."""
    names = set(cell["runs"])
    return [
        (run["name"], run["metric"]) for run in report["runs"] if run["name"] in names and run["metric"] is not None
    ]


def training_panels(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For every curve, size and VAE: over images, FLOPs and seconds; the largest size first."""
    places = {size["name"]: place for place, size in enumerate(report["sizes"])}
    groups: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for curve in sorted(report["curves"], key=lambda curve: -places[curve["size"]]):
        groups.setdefault((curve["name"], curve["size"], curve["vae"]), []).append(curve)
    for (name, size, vae), curves in groups.items():
        curves.sort(key=lambda curve: arms[curve["arm"]])
        plots = []
        for field, x_label in (
            (None, "images seen"),
            ("flops_per_image", "training FLOPs"),
            ("seconds_per_image", "seconds"),
        ):
            lines = [
                scaled(curve, arms, curve[field] if field else 1.0) for curve in curves if not field or curve[field]
            ]
            chart = study_charts.lines_chart(lines, x_label=x_label, y_label=name)
            if chart:
                plots.append({"title": f"Against {x_label}", "chart": chart})
        if plots:
            yield {"title": f"{under(size, vae)}: {name}", "plots": plots}


def scaled(curve: dict[str, Any], arms: dict[str, int], cost: float) -> Line:
    x = [images * cost for images in curve["images"]]
    low, high = ("mean", "mean") if len(arms) > CROWD else ("low", "high")
    return Line(arms[curve["arm"]], curve["arm"], x, curve["mean"], curve[low], curve[high])


def tuning_charts(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For every size: what each value gave, and each guidance where it is tuned too; the chosen one ringed."""
    groups: dict[tuple[str, str, bool], list[Line]] = {}
    for entry in sorted(report["tuning"], key=lambda entry: arms[entry["arm"]]):
        known, key = [p for p in entry["points"] if p["mean"] is not None and p["value"] > 0], entry["key"]
        if not known:
            continue
        sign = 1 if report["metric"]["better"] == "lower" else -1
        chosen = entry["chosen"] or {"value": None, "guidance": None}
        through = entry["chosen"] or min(known, key=lambda point: sign * point["mean"])
        # Along each axis of the grid, through what was chosen on the other.
        by_value = {p["value"]: p["mean"] for p in known if p["guidance"] == through["guidance"]}
        by_guidance = {p["guidance"]: p["mean"] for p in known if p["value"] == through["value"]}
        for setting, means, ring in ((key, by_value, "value"), ("guidance", by_guidance, "guidance")):
            if means and None not in means:
                x = sorted(means)
                y = [means[value] for value in x]
                line = Line(arms[entry["arm"]], entry["arm"], x, y, y, y, chosen[ring])
                groups.setdefault((entry["size"], setting, setting == key), []).append(line)
    for (size, setting, log_x), lines in groups.items():
        chart = study_charts.lines_chart(lines, x_label=setting, y_label=y_label(report), log_x=log_x, marked=True)
        if chart:
            yield {"title": under(size, None), "chart": chart}


# ---- inside the networks ----


def health_panels(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For every size and VAE: each quantity over depth, a line for every arm; the largest size first."""
    places = {size["name"]: place for place, size in enumerate(report["sizes"])}
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for entry in sorted(report["health"], key=lambda entry: (-places[entry["size"]], arms[entry["arm"]])):
        groups.setdefault((entry["size"], entry["vae"]), []).append(entry)
    for (size, vae), entries in groups.items():
        plots = []
        for field, title in LAYERS:
            lines, share = [], field not in ("variance", "grad_norm")
            for entry in entries:
                points = [
                    (layer["depth"], layer[field] * (100 if share else 1))
                    for layer in entry["layers"]
                    if layer[field] is not None
                ]
                x, y = [depth for depth, _ in points], [value for _, value in points]
                lines.append(Line(arms[entry["arm"]], entry["arm"], x, y, y, y))
            label = f"{title}, %" if share else title
            chart = study_charts.lines_chart(lines, x_label="depth", y_label=label, marked=True, share=share)
            if chart:
                plots.append({"title": title, "chart": chart})
        if plots:
            yield {"title": under(size, vae), "plots": plots}


def learned_panels(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For every arm that learns its curves: the curves and the densities of (t, B(t))."""
    for entry in report["health"]:
        plots = [
            {"title": curve["name"], "note": f"{len(curve['channels'])} of {curve['num_channels']} channels",
             "chart": charts.bezier_chart({"t_histogram": []} | curve, title=f"Learned curves of {curve['name']}")}
            for curve in entry["curves"]
        ]  # fmt: skip
        plots += [
            {"title": density["name"], "note": "density of (t, B(t))", "chart": study_charts.density(density)}
            for density in entry["densities"]
        ]
        if plots:
            yield {
                "title": f"{under(entry['size'], entry['vae'])}: {entry['arm']}",
                "run": entry["run"],
                "plots": plots,
            }


def picture_groups(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The pictures of one size and one VAE, and the arms that have any."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for item in report["pictures"]:
        groups.setdefault((item["size"], item["vae"]), []).append(item)
    for (size, vae), items in groups.items():
        shown = [name for name in arms if any(item["arms"].get(name) for item in items)]
        with_input = any(item["input"] for item in items)
        yield {"title": under(size, vae), "arms": shown, "items": items, "with_input": with_input}
