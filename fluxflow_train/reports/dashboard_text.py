"""What the W&B report of a study says in words and tables: Markdown, from the study's report alone."""

import json
from collections.abc import Sequence
from typing import Any

from fluxflow_train.reports.page import number

ALL = "all"


def answer(study: dict[str, Any]) -> str:
    """The answer in words, with its interval, and what counted as which answer."""
    told, counts = study["answer"], study["counts"]
    lines = [f"**{told['headline']}**", *told["sentences"], f"*Decision rule:* {told['rule']}"]
    lines.append(f"*Question:* {study['question']}")
    lines.append(
        f"{counts['finished']} of {counts['planned']} runs finished, {counts['failed']} failed, "
        f"{counts['pending']} to come; verdict: {told['verdict']} ({study['status']})."
    )
    return "\n\n".join(lines)


def ratios(study: dict[str, Any]) -> str:
    """By how much larger a baseline must be for the quality of the candidate."""
    rows = [
        [
            *pair(entry),
            plain(entry["vae"]),
            number(entry["ratio"]),
            interval(entry) if entry["bounded"] else f"{interval(entry)}, unbounded",
            entry["n"],
            entry["note"],
        ]
        for entry in study["ratios"]
    ]
    ratio = f"size ratio ({study['axis']['label']})"
    return table(["candidate", "baseline", "VAE", ratio, "interval", "seeds", "note"], rows)


def targets(study: dict[str, Any]) -> str:
    """The four rows of the project page, empty where nothing was measured."""
    part = study["targets"]
    if part is None:
        return "Not measured in this study."
    rows = [
        [row["label"], *map(plain, row["published"]), *(shown(row, arm) for arm in part["arms"]), row["note"]]
        for row in part["rows"]
    ]
    head = ["", *(f"published {i + 1}" for i in range(max(len(row["published"]) for row in part["rows"])))]
    return f"{table([*head, *part['arms'], 'how'], rows)}\n\n{part['hardware']}"


def shown(row: dict[str, Any], arm: str) -> str:
    value = row["values"].get(arm)
    return number(value) if value is None else f"{number(value)} {row['unit']}".strip()


def cells(study: dict[str, Any]) -> str:
    """Every arm and size: quality over the seeds, and what it cost."""
    unit = study["metric"]["unit"]
    head = ["arm", "size", "VAE", f"{study['metric']['label']} {unit}".strip(), "interval", "seeds"]
    head += ["parameters", "FLOPs/image", "residual", "learning rate", "seconds"]
    rows = [
        [
            *(plain(cell[key]) for key in ("arm", "size", "vae")),
            number(cell["mean"], unit),
            interval(cell, unit),
            cell["n"],
            *(number(cell[key]) for key in ("parameters", "flops")),
            "–" if cell["residual"] is None else f"{cell['residual']:+.2%}",
            *(number(cell[key]) for key in ("learning_rate", "seconds")),
        ]
        for cell in study["cells"]
    ]
    return table(head, rows)


def comparisons(study: dict[str, Any]) -> str:
    """Paired differences, positive where the candidate is better."""
    unit = study["metric"]["unit"]
    head = ["candidate", "baseline", "size", "VAE", f"difference {unit}".strip(), "interval", "seeds"]
    head += ["p (Holm)", "margin", "equivalent", "detectable"]
    rows = [
        [
            *pair(entry),
            entry["size"] or ALL,
            plain(entry["vae"]),
            number(entry["difference"], unit),
            interval(entry, unit),
            entry["n"],
            number(entry["p_holm"]),
            number(entry["margin"]),
            plain(entry["equivalent"]),
            number(entry["detectable"]),
        ]
        for entry in study["comparisons"]
    ]
    return table(head, rows)


def failures(study: dict[str, Any]) -> str:
    """Every attempt that did not finish."""
    rows = [
        [entry["run"], entry["attempt"], entry["event"], entry["time"], plain(entry["retried"]), entry["error"] or ""]
        for entry in study["failures"]
    ]
    return table(["run", "attempt", "what", "when", "retried", "error"], rows)


def provenance(study: dict[str, Any]) -> str:
    """Where the numbers come from."""
    facts = [f"- {name}: `{plain(value)}`" for name, value in study["provenance"].items()]
    return "\n".join([*facts, *(f"- {warning}" for warning in study["warnings"])])


# ---- parts of tables ----


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """GitHub's Markdown; what would end a cell is escaped."""
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(escaped(str(cell)) for cell in line)} |" for line in lines)


def escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")


def pair(entry: dict[str, Any]) -> list[str]:
    return [entry["arm"], entry["baseline"]]


def interval(entry: dict[str, Any], unit: str = "") -> str:
    if entry["low"] is None and entry["high"] is None:
        return "–"
    return f"{number(entry['low'], unit)} to {number(entry['high'], unit)}"


def plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
