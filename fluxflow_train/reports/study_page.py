"""The page of a study, from its dictionary (study_report/v1) alone: the answer, and everything that it rests on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fluxflow_train.files import write_atomically
from fluxflow_train.reports import charts, page, schema, study_charts, study_forest, study_markdown
from fluxflow_train.reports.study_charts import Line
from fluxflow_train.reports.study_forest import Row
from fluxflow_train.reports.study_words import between, fine, missing, signed

COSTS = {"parameters": "parameters", "flops": "FLOPs per image", "seconds": "seconds of training"}
LAYERS = (
    ("variance", "Activation variance"),
    ("grad_norm", "Gradient norm"),
    ("dead", "Dead units"),
    ("saturated", "Saturated"),
    ("outside", "t outside [0, 1]"),
)
TONES = {"supported": "final", "refuted": "smoke", "undecided": "partial"}
SIGNIFICANT = 0.05


def render(report: dict[str, Any]) -> str:
    """The study as HTML5; every text in it is escaped."""
    environment = page.environment()
    environment.filters |= {"fine": fine, "signed": signed, "between": between}
    arms = order(report)
    return environment.get_template("study.html.jinja").render(
        report=report,
        arms=arms,
        keys={name: study_charts.key(place) for name, place in arms.items()},
        study_style=page.source("study.css"),
        tone=TONES.get(report["answer"]["verdict"], "quiet"),
        missing=missing(report),
        run_places={run["name"]: place for place, run in enumerate(report["runs"])},
        ratios=ratio_chart(report, arms),
        quality=list(quality_panels(report, arms)),
        forests=list(forests(report, arms)),
        rate_distortion=rate_distortion_chart(report, arms),
        effects=effects_chart(report),
        training=list(training_panels(report, arms)),
        tuning=list(tuning_charts(report, arms)),
        health=list(health_panels(report, arms)),
        learned=list(learned_panels(report)),
        pictures=list(picture_groups(report, arms)),
    )


def write_study_report(report: dict[str, Any], folder: Path) -> None:
    """`report.json`, and `report.html` and `report.md` from it alone, in `folder`; each is replaced whole."""
    schema.check(report, "study_report/v1")
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    html, markdown = render(report), study_markdown.render(report)
    write_atomically(folder / "report.json", text.encode())
    write_atomically(folder / "report.html", html.encode())
    write_atomically(folder / "report.md", markdown.encode())


def order(report: dict[str, Any]) -> dict[str, int]:
    """The place of every arm, which is its colour and shape: the candidate first."""
    names = [arm["name"] for arm in sorted(report["arms"], key=lambda arm: not arm["is_candidate"])]
    return {name: place for place, name in enumerate(names)}


def y_label(report: dict[str, Any]) -> str:
    metric = report["metric"]
    return f"{metric['label']}, {metric['unit']}" if metric["unit"] else metric["label"]


def under(size: str | None, vae: str | None) -> str:
    """The heading of what belongs to one size and one VAE; "" where there is neither."""
    return ", ".join([f"Size {size}"] * (size is not None) + [f"VAE {vae}"] * (vae is not None))


# ---- the answer and its evidence ----


def ratio_chart(report: dict[str, Any], arms: dict[str, int]) -> Markup | None:
    rows = [
        Row(
            arm=arms[entry["baseline"]],
            label=against(entry, report["candidate"]) + (f", VAE {entry['vae']}" if entry["vae"] else ""),
            estimate=entry["ratio"],
            low=entry["low"],
            high=entry["high"],
            text=f"{fine(entry['ratio'])}×  {between(entry)}",
            solid=(entry["low"] or 0) > 1 or (entry["high"] is not None and entry["high"] < 1),
        )
        for entry in report["ratios"]
        if entry["ratio"] is not None
    ]
    return study_forest.ratios(rows, f"times fewer {report['axis']['label']} at equal quality") if rows else None


def against(entry: dict[str, Any], candidate: str) -> str:
    if entry["arm"] == candidate:
        return f"against {entry['baseline']}"
    return f"{entry['arm']} against {entry['baseline']}"


def difference_row(entry: dict[str, Any], arm: int, label: str, unit: str, solid: bool) -> Row:
    text = f"{signed(entry['difference'], unit)}  {between(entry, unit, sign=True)}"
    return Row(arm, label, entry["difference"], entry["low"], entry["high"], text, solid)


def forests(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A chart of paired differences for all sizes together and for each size, all on one axis."""
    metric, known = report["metric"], [c for c in report["comparisons"] if c["difference"] is not None]
    margin = next((c["margin"] for c in known if c["margin"]), None)
    groups: dict[tuple[str | None, str | None], list[Row]] = {}
    for c in known:
        solid = c["p_holm"] is not None and c["p_holm"] < SIGNIFICANT
        row = difference_row(c, arms[c["baseline"]], against(c, report["candidate"]), metric["unit"], solid)
        groups.setdefault((c["size"], c["vae"]), []).append(row)
    span = study_forest.span_of([row for rows in groups.values() for row in rows], margin)
    label = f"{y_label(report)}: → better than the baseline"
    for (size, vae), rows in groups.items():
        title = under(size, vae) if size else ", ".join(["All sizes"] + ([under(None, vae)] if vae else []))
        yield {"title": title, "chart": study_forest.differences(rows, margin, span, label)}


def rate_distortion_chart(report: dict[str, Any], arms: dict[str, int]) -> Markup | None:
    unit = report["metric"]["unit"]
    rows = [
        difference_row(entry, arms[entry["baseline"]], against(entry, report["candidate"]), unit, True)
        for entry in report["rate_distortion"]
        if entry["difference"] is not None
    ]
    return forest_of(rows, f"{y_label(report)} at equal rate: → better") if rows else None


def effects_chart(report: dict[str, Any]) -> Markup | None:
    if report["factorial"] is None:
        return None
    effects = [effect for effect in report["factorial"]["effects"] if effect["difference"] is not None]
    rows = [
        difference_row(e, i, e["label"], report["metric"]["unit"], e["p"] is not None and e["p"] < SIGNIFICANT)
        for i, e in enumerate(effects)
    ]
    return forest_of(rows, f"{y_label(report)}: → better") if rows else None


def forest_of(rows: Sequence[Row], label: str) -> Markup:
    return study_forest.differences(rows, None, study_forest.span_of(rows, None), label)


# ---- quality against cost, during training, over the learning rate ----


def quality_panels(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For each VAE (or once): quality over every cost; the fitted lines stand where sizes are matched by that cost."""
    label = report["axis"]["label"]
    costs = COSTS if label in COSTS.values() else COSTS | {"cost": label}
    for vae in report["vaes"] or [None]:
        cells = [cell for cell in report["cells"] if cell["vae"] == vae]
        seeds = {i: seeds_of(report, cell) for i, cell in enumerate(cells)}
        fits = {
            (line["arm"], *line["x"], *line["y"]): line
            for r in report["ratios"]
            if r["vae"] == vae
            for line in r["lines"]
        }
        plots = []
        for field, x_label in costs.items():
            lines = list(fits.values()) if x_label == label else []
            chart = study_charts.quality(
                cells, seeds, lines, arms, field=field, x_label=x_label, y_label=y_label(report)
            )
            if chart:
                plots.append({"title": f"Against {x_label}", "chart": chart})
        if plots:
            yield {"title": under(None, vae), "plots": plots}


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
    return Line(arms[curve["arm"]], curve["arm"], x, curve["mean"], curve["low"], curve["high"])


def tuning_charts(report: dict[str, Any], arms: dict[str, int]) -> Iterator[dict[str, Any]]:
    """For every size and setting: what each value gave, the chosen one ringed."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for entry in sorted(report["tuning"], key=lambda entry: arms[entry["arm"]]):
        points = sorted((p["value"], p["mean"]) for p in entry["points"] if p["mean"] is not None and p["value"] > 0)
        x, y = [value for value, _ in points], [mean for _, mean in points]
        line = Line(arms[entry["arm"]], entry["arm"], x, y, y, y, entry["chosen"])
        groups.setdefault((entry["size"], entry["key"]), []).append(line)
    for (size, setting), lines in groups.items():
        chart = study_charts.lines_chart(lines, x_label=setting, y_label=y_label(report), log_x=True, marked=True)
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
