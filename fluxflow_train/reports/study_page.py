"""The page of a study, from its dictionary (study_report/v1) alone: the answer, and everything that it rests on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fluxflow_train.files import write_atomically
from fluxflow_train.reports import page, schema, study_charts, study_forest, study_markdown
from fluxflow_train.reports.study_forest import Row
from fluxflow_train.reports.study_panels import (
    CROWD,
    health_panels,
    learned_panels,
    picture_groups,
    quality_panels,
    training_panels,
    tuning_charts,
    under,
    y_label,
)
from fluxflow_train.reports.study_words import between, fine, is_guided, level, missing, signed

TONES = {"supported": "final", "refuted": "smoke", "undecided": "partial"}
NO_ARM = 6  # the place whose colour is the text's


def render(report: dict[str, Any]) -> str:
    """The study as HTML5; every text in it is escaped."""
    environment = page.environment()
    environment.filters |= {"fine": fine, "signed": signed, "between": between}
    arms = order(report)
    return environment.get_template("study.html.jinja").render(
        report=report,
        level=level(report),
        alpha=f"{1 - report['confidence']:.3g}",
        arms=arms,
        keys={name: study_charts.key(place) for name, place in arms.items()},
        study_style=page.source("study.css"),
        tone=TONES.get(report["answer"]["verdict"], "quiet"),
        missing=missing(report),
        crowd=len(arms) > CROWD,
        guided=is_guided(report),
        run_places={run["name"]: place for place, run in enumerate(report["runs"])},
        ratios=ratio_chart(report, arms),
        quality=[panel for panel in quality_panels(report, arms) if panel["plots"]],
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
        solid = c["p_holm"] is not None and c["p_holm"] < 1 - report["confidence"]
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
    alpha = 1 - report["confidence"]
    effects = [effect for effect in report["factorial"]["effects"] if effect["difference"] is not None]
    rows = [
        difference_row(e, NO_ARM, e["name"], report["metric"]["unit"], e["p"] is not None and e["p"] < alpha)
        for e in effects
    ]
    return forest_of(rows, f"{y_label(report)}: → better") if rows else None


def forest_of(rows: Sequence[Row], label: str) -> Markup:
    return study_forest.differences(rows, None, study_forest.span_of(rows, None), label)
