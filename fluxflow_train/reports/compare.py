"""Reports side by side, where that means something: otherwise the field that differs is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxflow_train.errors import UserError
from fluxflow_train.reports import schema

# In the order in which a reader would ask. What a model is and how it draws may differ: that is what is compared.
MUST_AGREE = (
    ("kind",),
    ("protocol", "id"),
    ("protocol", "resolution"),
    ("protocol", "image_size"),
    ("protocol", "split"),
    ("protocol", "dataset"),
    ("samples", "synced"),
    ("samples", "drawn"),
    ("extractor", "name"),
    ("extractor", "weights_sha256"),
    ("extractor", "resizer"),
    ("extractor", "dtype"),
    ("protocol", "hash"),
    ("reference", "images"),
    ("reference", "list_sha256"),
    ("reference", "keys_sha256"),
    ("samples", "list_sha256"),
    ("samples", "prompts_sha256"),
    ("samples", "seed"),
    ("estimator",),
)
MEASURED = ("trace_cross_check",)  # of an estimator: figures, no settings
TOLERANCE = 1e-4  # of fingerprints, relative: another machine's rounding is below it, another precision above
SHOWN = ("parameters", "images_seen", "weights_sha256")


def find(run: Path, protocol: str | None) -> dict[str, Any]:
    """The report of a run's directory, an evaluation's folder or a report.json.

    `protocol` chooses among a run's evaluations; None: the run's own report, or its only evaluation.

    Raises:
        UserError: there is none, or there are several.
    """
    if protocol is None and (run.is_file() or (run / "report.json").exists()):
        return schema.read(run)
    found = [schema.read(path) for path in sorted(run.glob("evaluations/*/report.json"))]
    found = [report for report in found if protocol in (None, report["protocol"]["id"])]
    if len(found) == 1:
        return found[0]
    what = "report" if protocol is None else f"evaluation by {protocol}"
    if not found:
        command = "python -m fluxflow_train.evaluate run=DIR" + (f" protocol={protocol}" if protocol else "")
        raise UserError(f"there is no {what} in {run}: make one with {command}")
    raise UserError(f"there are {len(found)} reports in {run}: name one of the folders in {run / 'evaluations'}")


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first field that must agree and does not, with both values; "" where the reports compare."""
    for path in MUST_AGREE:
        ours, theirs = (settings(value(report, path)) for report in (a, b))
        if ours != theirs:
            return f"{'.'.join(path)} is {brief(ours)} and {brief(theirs)}"
    prints = [value(report, ("extractor", "fingerprint")) or [] for report in (a, b)]
    if any(abs(x - y) > TOLERANCE * max(abs(x), abs(y), 1) for x, y in zip(*prints, strict=True)):
        return "extractor.fingerprint differs: another version or precision of the same network"
    return ""


def value(report: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = report
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def settings(content: Any) -> Any:
    """Without figures that an estimator measured of itself."""
    if isinstance(content, dict):
        return {key: settings(item) for key, item in content.items() if key not in MEASURED}
    return content


def brief(content: Any) -> str:
    text = str(content)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def refuse_unlike(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
    """Raises UserError naming the first field in which a report differs from the first one."""
    for name, report in zip(names[1:], reports[1:], strict=True):
        found = difference(reports[0], report)
        if found:
            raise UserError(
                f"{names[0]} and {name} do not compare: {found}; evaluate both by the same protocol, weights and N"
            )


def table(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> str:
    """GitHub's Markdown: a column a report, a row a result, the best value bold where one direction is better."""
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines.append(f"| status | {' | '.join(report['status'] for report in reports)} |")
    for key in SHOWN:
        shown = [report["model"].get(key) for report in reports]
        lines.append(f"| {key} | {' | '.join(f'{v:,}' if isinstance(v, int) else brief(v) for v in shown)} |")
    samplings = [report["model"].get("sampling", {}) for report in reports]
    for key in ("solver", "steps", "guidance"):
        if any(key in sampling for sampling in samplings):
            lines.append(f"| {key} | {' | '.join(str(sampling.get(key, '')) for sampling in samplings)} |")
    for entry in reports[0]["results"]:
        entries = [named(report, entry["name"]) for report in reports]
        label = f"{'&nbsp;&nbsp;' if entry['baseline_of'] else ''}{entry['label']}"
        unit = f", {entry['unit']}" if entry["unit"] else ""
        lines.append(f"| {label}{unit} | {' | '.join(cells(entries, entry))} |")
    return "\n".join(lines) + "\n"


def named(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((entry for entry in report["results"] if entry["name"] == name), None)


def cells(entries: Sequence[dict[str, Any] | None], first: dict[str, Any]) -> list[str]:
    """The values with their intervals; the best is bold, but no baseline."""
    values = [entry["raw"] for entry in entries if entry is not None and entry["raw"] is not None]
    best = None
    if first["better"] is not None and first["baseline_of"] is None and len(set(values)) > 1:
        best = min(values) if first["better"] == "lower" else max(values)
    return [cell(entry, best) for entry in entries]


def cell(entry: dict[str, Any] | None, best: float | None) -> str:
    if entry is None or entry["raw"] is None:
        return "–"
    text = f"{entry['raw']:.5g}"
    text = f"**{text}**" if entry["raw"] == best else text
    low_high = entry["interval"]
    return f"{text} ({low_high[0]:.4g} to {low_high[1]:.4g})" if low_high else text
