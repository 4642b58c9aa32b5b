"""Numbers and reasons in words, the same on the page and in report.md."""

from typing import Any

from fluxflow_train.reports.page import number


def fine(value: float | None) -> str:
    """A setting or a ratio: up to three digits, no padding."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def signed(value: float | None, unit: str = "") -> str:
    """A difference, with its sign."""
    if value is None:
        return "–"
    return f"{'−' if value < 0 else '+'}{number(abs(value), unit)}"


def between(entry: dict[str, Any], unit: str | None = None, sign: bool = False) -> str:
    """[low, high] of an entry; a missing bound is said, "" where both are missing."""
    low, high = entry["low"], entry["high"]
    if low is None and high is None:
        return ""
    texts = [fine(v) if unit is None else signed(v, unit) if sign else number(v, unit) for v in (low, high)]
    texts = ["−∞" if sign else "0"] * (low is None) + texts[low is None :]
    return f"[{texts[0]}, {'∞' if high is None else texts[1]}]"


def level(report: dict[str, Any]) -> str:
    """Of the intervals."""
    return f"{100 * report['confidence']:g} %"


def is_guided(report: dict[str, Any]) -> bool:
    """Whether guidance was tuned."""
    return any(point["guidance"] is not None for entry in report["tuning"] for point in entry["points"])


def missing(report: dict[str, Any]) -> dict[str, str]:
    """Why a part of the study is not there; only parts that are not."""
    one_size = len(report["sizes"]) < 2
    nothing = "no run has finished yet"
    finished = report["counts"]["finished"] > 0
    seeds = "no two arms have finished with a seed in common"
    reasons = {
        "cells": "every run is still pending or failed",
        "ratios": "a ratio needs at least two sizes, this study has one" if one_size else seeds,
        "comparisons": seeds,
        "tuning": "no setting was tuned: every arm keeps the plan's own",
        "factorial": "this study does not cross VAEs with flow models",
        "rate_distortion": "rates agree, or are not measured: no comparison at equal rate was made",
        "curves": "no run left a curve of the metric",
        "health": "no run recorded its layers",
        "pictures": "no run left pictures",
        "targets": "the plan does not measure them",
        "failures": "no attempt failed, was stopped or killed",
    }
    always = ("tuning", "factorial", "targets", "failures")
    return {
        part: reason if finished or part in always or (part == "ratios" and one_size) else nothing
        for part, reason in reasons.items()
        if not report[part] or (part == "cells" and not any(c["mean"] is not None for c in report["cells"]))
    }
