"""A report into the W&B run that trained the model: numbers in its summary, pictures, and the page itself."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from fluxflow_train.records import WandbRecords

PICTURES = ("captioned", "triples", "examples")  # of the kinds of reports, the first that it has


def log_report(report: dict[str, Any], folder: Path, settings: Any) -> None:
    """Go on with the W&B run of `settings`, the run's own logger; `folder` has the report's files.

    Numbers are named `<protocol>/<result>`, with `/guidance-<scale>` where scales were swept.

    Raises:
        UserError: wandb is not installed.
    """
    records = WandbRecords(**{key: value for key, value in settings.items() if key != "_target_"})
    import wandb

    run = records.experiment
    records.define_axis()
    try:
        name = report["protocol"]["id"]
        run.summary.update(numbers(report))
        page = folder / "report.html"
        run.log({f"{name}/report": wandb.Html(str(page))})
        pictures = next((report["figures"][key] for key in PICTURES if report["figures"].get(key)), [])
        run.log({f"{name}/pictures": [picture(wandb, item) for item in pictures]})
        artifact = wandb.Artifact(f"report-{settings.id}-{folder.name}", type="report")
        for path in (page, folder / "report.json", folder / "report.md"):
            artifact.add_file(str(path))
        run.log_artifact(artifact)
    finally:
        run.finish()


def numbers(report: dict[str, Any]) -> dict[str, float | str]:
    """Every result that has a value, and the status."""
    name = report["protocol"]["id"]
    found: dict[str, float | str] = {f"{name}/status": report["status"]}
    found |= {f"{name}/{entry['name']}": entry["raw"] for entry in report["results"] if entry["raw"] is not None}
    for part in report.get("sweep", []):
        for entry in part["results"]:
            if entry["raw"] is not None:
                found[f"{name}/{entry['name']}/guidance-{part['guidance']:g}"] = entry["raw"]
    return found


def picture(wandb: Any, item: dict[str, Any]) -> Any:
    """A `wandb.Image` of one of the report's base64 PNGs."""
    data = item.get("image") or item["reconstruction"]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return wandb.Image(image.convert("RGB"), caption=item["caption"])
