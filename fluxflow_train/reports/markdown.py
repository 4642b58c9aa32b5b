"""report.md: the numbers for pasting into an issue or a paper's notes, from the report alone."""

from typing import Any


def render(report: dict[str, Any]) -> str:
    """GitHub's Markdown."""
    model = report["model"]
    title = model.get("experiment", model["class"])
    lines = [f"# {title}: {report['protocol'].get('title', report['protocol']['id'])}", ""]
    reasons = f": {'; '.join(report['status_reasons'])}" if report["status_reasons"] else ""
    lines += [f"**{report['status']}**{reasons}", "", "```", report["command"], "```", ""]
    lines += table(report["results"])
    for part in report.get("sweep", []):
        lines += ["", f"## Guidance {part['guidance']:g}", "", *table(part["results"])]
    lines += ["", *(f"- {warning}" for warning in report["warnings"])]
    extractor = report["extractor"]
    facts = {
        "protocol": f"{report['protocol']['id']}, {report['protocol']['hash'][:12]}",
        "extractor": "none" if extractor is None else f"{extractor['name']}, {extractor['weights_sha256'][:12]}",
        "model": f"{model['weights_sha256'][:12]}, {model['parameters']:,} parameters",
        "checks": f"{sum(check['passed'] for check in report['checks'])} of {len(report['checks'])} passed",
    }
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts.items()), ""])


def table(results: list[dict[str, Any]]) -> list[str]:
    """A row for each result; baselines are indented under theirs."""
    lines = ["| metric | value | 95 % interval | images |", "|---|---|---|---|"]
    for entry in results:
        label = f"{'&nbsp;&nbsp;' if entry['baseline_of'] else ''}{entry['label']}"
        unit = f" {entry['unit']}" if entry["unit"] else ""
        value = "undefined" if entry["value"] is None else f"{entry['value']:.5g}{unit}"
        interval = entry["interval"]
        between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        lines.append(f"| {label} | {value} | {between} | {entry['n_fake']} |")
    return lines
