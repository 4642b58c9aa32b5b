"""What the ledger keeps of a finished run: read from its directory, which may be deleted afterwards."""

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fluxflow_train.callbacks.health import FILE_NAME as HEALTH
from fluxflow_train.errors import UserError
from fluxflow_train.files import sha256_of
from fluxflow_train.records import CLOCK, FILE_NAME
from fluxflow_train.records import read as read_records
from fluxflow_train.reports.protocol import digest
from fluxflow_train.run_directory import flat, is_free

MAX_ROWS = 200  # of each curve
PICTURES = 6
OWN = (
    "seed",
    "run_id",
    "vae_sha256",
)  # keys in which the seeds of a cell differ; what is computed from them has them too


def collect(directory: Path, metric: str | None, budget_images: int) -> dict[str, Any]:
    """Numbers, curves, health and pictures of a run, as plain JSON; `swept` has the metric by guidance scale.

    Args:
        metric: None for a run that is not measured by the plan's, as the VAEs that flows are trained on.

    Raises:
        UserError: the run's report is missing, or lacks the metric, at some guidance or at all; or the run ended before
            its budget.
    """
    try:
        report = json.loads((directory / "report.json").read_text())
        description = json.loads((directory / "model.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{directory} has no whole report and model ({error}): it was not finished") from error
    results = {entry["name"]: entry["raw"] for entry in report["results"]}
    if metric is not None and results.get(metric) is None:
        known = ", ".join(name for name, value in results.items() if value is not None)
        raise UserError(f"the report of {directory} has no result {metric}: there are {known}")
    swept = [(part["guidance"], value_of(part["results"], metric)) for part in report.get("sweep", [])]
    if any(value is None for _, value in swept):
        raise UserError(f"the report of {directory} has no result {metric} by guidance scale: tune it by kid")
    made = description["provenance"]
    if made["images_seen"] < budget_images:
        raise UserError(f"{directory} ended at {made['images_seen']:,} of {budget_images:,} images")
    return {
        "metric": None if metric is None else results[metric],
        "swept": swept,
        "results": results,
        "report_status": report["status"],
        "status_reasons": report["status_reasons"],
        "images_seen": made["images_seen"],
        "seconds": made["seconds_training"],
        "memory_mib": results.get("peak_memory"),
        "rate_nats": results.get("rate_nats"),
        "weights_sha256": description["sha256"],
        "config_sha256": sha256_of(directory / "config.yaml"),
        "compared_sha256": compared(directory / "config.yaml"),
        "config": (directory / "config.yaml").read_text(),
        "command": made["command"],
        "git": made["git"],
        "environment": report["environment"],
        "curves": curves(directory / FILE_NAME),
        "health": json.loads((directory / HEALTH).read_text()) if (directory / HEALTH).exists() else None,
        "pictures": pictures(report["figures"]),
    }


def value_of(results: list[dict[str, Any]], metric: str | None) -> float | None:
    return next((entry["raw"] for entry in results if entry["name"] == metric), None)


def compared(path: Path) -> str:
    """A digest of the configuration that all seeds of a cell share."""
    leaves = flat(OmegaConf.to_container(OmegaConf.load(path)))
    own = {key: value for key, value in leaves.items() if not is_free(key) and key.rpartition(".")[2] not in OWN}
    return digest([f"{key}={own[key]}" for key in sorted(own)])


def curves(path: Path) -> dict[str, dict[str, list[float]]]:
    """Every scalar by name: {images, values}, where it is finite; thinned to `MAX_ROWS`, the last kept."""
    columns, rows = read_records(path)
    found = {}
    for name in columns:
        points = [(int(row[CLOCK]), float(row[name])) for row in rows if name in row and name != CLOCK]
        points = [point for point in points if math.isfinite(point[1])]  # updates with NaN are left out and counted
        step = -(-len(points) // MAX_ROWS)
        kept = points[:: -step or -1][::-1]
        if kept:
            found[name] = {"images": [images for images, _ in kept], "values": [value for _, value in kept]}
    return found


def pictures(figures: dict[str, Any]) -> list[dict[str, str | None]]:
    """The first of a report's pictures as {key, caption, input, output}, base64 PNGs; drawn ones have no input."""
    if "captioned" in figures:
        shown = figures["captioned"][:PICTURES]
        return [
            {"key": str(number), "caption": item["caption"], "input": None, "output": item["image"]}
            for number, item in enumerate(shown)
        ]
    return [
        {"key": item["key"], "caption": item["caption"], "input": item["input"], "output": item["reconstruction"]}
        for item in figures.get("examples", [])[:PICTURES]
    ]
