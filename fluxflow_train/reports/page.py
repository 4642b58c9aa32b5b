"""The page: one HTML file without network or dependencies, rendered from the report's dictionary alone."""

from html import escape
from typing import Any


def render(report: dict[str, Any]) -> str:
    """The report as HTML5."""
    rows = "".join(f"<tr><td>{escape(r['label'])}<td>{r['value']}" for r in report["results"])
    return f"<!doctype html><meta charset=utf-8><title>Report</title><table>{rows}</table>"
