"""The page: one HTML file without network or dependencies, rendered from the report's dictionary alone."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fluxflow_train.reports import charts, evaluation_charts

FOLDER = Path(__file__).parent
CURVES = (
    ("PSNR", "dB", ("train/psnr", "val/psnr")),
    ("SSIM", "", ("val/ssim",)),
    ("Loss", "", ("train/loss", "train/loss_rec", "val/loss")),
    ("Validation loss by quarters of t", "", ("val/loss_t0", "val/loss_t1", "val/loss_t2", "val/loss_t3")),
    ("Rate", "nats per image", ("train/rate_nats", "val/rate_nats")),
    ("KL", "nats per latent element", ("train/loss_kl",)),
    ("Adversarial losses", "", ("train/loss_gan", "train/loss_disc")),
    ("Gradient norm", "", ("train/grad_norm",)),
    ("Gradient norms of the layers, largest to smallest", "powers of ten", ("health/grad_norm_spread",)),
    ("Dead channels", "share", ("health/dead", "health/dead_worst")),
    ("Curves at an end, or beyond", "share of t", ("health/saturated", "health/outside")),
    ("Variance of the last activation", "", ("health/variance_last",)),
    ("Learning rate", "", ("train/lr",)),
    ("Captions dropped", "share of images", ("train/dropped",)),
    ("Training speed", "images/s", ("train/images_per_second",)),
)
BASELINES = (
    ("pca", "PCA"),
    ("white", "Plain white"),
    ("noise_floor", "Real vs real"),
    ("another_image", "Another image"),
)
VAE_TILES = ("ssim", "psnr_nonwhite", "psnr_sampled", "rate_nats", "parameters", "images_per_second", "peak_memory")
FLOW_TILES = ("parameters_flow", "parameters_text", "parameters_vae", "seconds_per_image", "peak_memory")
FLOW_TILES += ("caption_effect",)
DISTANCES = ("fid", "frechet", "kid")
STATUS = {
    "final": "every self-check passed",
    "partial": "correct, but not everything is there",
    "smoke": "not a result",
}


def number(value: float | None, unit: str = "") -> str:
    """For people: decibels to a hundredth, large counts with k or M, the rest to four digits."""
    if value is None:
        return "–"
    if unit == "dB":
        return f"{value:.2f}"
    for least, size, letter in ((1e12, 1e12, " T"), (1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{letter}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if unit == "images/s":
        return f"{value:.3g}"
    if 0.001 <= abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.2g}"


def plain(value: Any) -> str:
    """A provenance value as one line of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def metric_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that have baselines, each with those by kind."""
    rows = []
    for head in results:
        rivals = {r["baseline"]: r for r in results if r["baseline_of"] == head["name"]}
        if rivals:
            rows.append({"head": head, "rivals": rivals, "digits": head["unit"]})
    return rows


def notes(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What must be said beside the numbers: (labels, text), each text once."""
    labels: dict[str, list[str]] = {}
    for result in results:
        if result["note"]:
            known = labels.setdefault(result["note"], [])
            if result["label"] not in known:
                known.append(result["label"])
    return [(", ".join(names), text) for text, names in labels.items()]


def bars(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The headline result and its baselines, the width of each in percent of the largest."""
    rows = [r for r in results if (r["name"] == name or r["baseline_of"] == name) and r["value"] is not None]
    largest = max((r["value"] for r in rows), default=1) or 1
    return [r | {"width": max(0.0, round(100 * r["value"] / largest, 1))} for r in rows]


def training_charts(curves: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The known curves in their groups, then each other column by itself."""
    known = {name for _, _, names in CURVES for name in names}
    groups = [*CURVES, *((name, "", (name,)) for name in curves if name not in known)]
    drawn = []
    for title, unit, names in groups:
        series = {name: curves[name] for name in names if name in curves}
        if series:
            chart = charts.line_chart(series, title=f"{title} against images seen", x_label="images seen", unit=unit)
            drawn.append({"title": title, "unit": unit, "names": list(series), "chart": chart})
    return drawn


def bezier_charts(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chart per trainable Bezier."""
    return [e | {"chart": charts.bezier_chart(e, title=f"Learned curves of {e['name']}")} for e in entries]


def psnr_chart(report: dict[str, Any], mean: float | None) -> Markup | None:
    """The distribution over images, where there is one."""
    counts = report["figures"]["psnr_histogram"]
    if mean is None or not sum(counts["counts"]):
        return None
    return charts.histogram(
        counts["edges"], counts["counts"], title="PSNR of each image", x_label="PSNR, dB", mark=mean
    )


def vae_view(report: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the page of a reconstruction report needs beside the report."""
    kinds = {r["baseline"] for r in report["results"]}
    return {
        "headline": by_name["psnr"],
        "baselines": [(kind, label) for kind, label in BASELINES if kind in kinds],
        "bars": bars(report["results"], "psnr"),
        "tiles": [by_name[name] for name in VAE_TILES if name in by_name],
        "histogram": psnr_chart(report, by_name["psnr"]["raw"]),
    }


def flow_view(report: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the page of a text-to-image report needs beside the report."""
    quarters = [r for name, r in by_name.items() if name.startswith("loss_t") and r["value"] is not None]
    largest = max((r["value"] for r in quarters), default=1) or 1
    return {
        "loss": by_name["loss"],
        "loss_zero": by_name["loss_zero"],
        "quarters": [
            r | {"label": r["label"].rpartition(", ")[2], "width": round(100 * r["value"] / largest, 1)}
            for r in quarters
        ],
        "kid": by_name.get("kid"),
        "floor": by_name.get("kid_noise_floor"),
        "bars": bars(report["results"], "kid"),
        "caption": by_name["caption_effect"],
        "noise": by_name["noise_effect"],
        "tiles": [by_name[name] for name in FLOW_TILES if name in by_name],
    }


def evaluation_view(report: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the page of an evaluation needs beside the report. Its headline is the first distance to real images."""
    heads = [r for r in report["results"] if r["baseline_of"] is None]
    measured = [r for r in heads if r["value"] is not None]
    headline = next((r for r in measured if r["name"].startswith(DISTANCES)), measured[0] if measured else heads[0])
    return {
        "heads": heads,
        "headline": headline,
        "bars": bars(report["results"], headline["name"]),
        "tiles": [r for r in measured if r is not headline][:6],
        "sizes": [evaluation_charts.by_size(entry) for entry in report["figures"]["frechet_by_size"]],
        "pareto": evaluation_charts.over_guidance(report["figures"]["pareto"], by_name),
    }


VIEWS = {
    "reconstruction": ("vae", vae_view),
    "text-to-image": ("flow", flow_view),
    "evaluation": ("evaluation", evaluation_view),
}


def environment() -> Environment:
    """Of every page: texts are escaped, an unknown name is an error, numbers are written for people."""
    found = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "plain": plain}
    found.globals |= {"style": source("page.css"), "script": source("page.js")}
    return found


def source(name: str) -> Markup:
    """A style sheet or a script, to stand in the page."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def render(report: dict[str, Any]) -> str:
    """The report as HTML5; every text in it is escaped. Its `kind` says which page it gets."""
    results = report["results"]
    by_name = {r["name"]: r for r in results}
    name, view = VIEWS[report["kind"]]
    template = environment().get_template(f"{name}.html.jinja")
    return template.render(
        report=report,
        rows=metric_rows(results),
        notes=notes(results),
        training=training_charts(report["figures"]["curves"]),
        curves=bezier_charts(report["figures"]["bezier"]),
        status_text=STATUS[report["status"]],
        **view(report, by_name),
    )
