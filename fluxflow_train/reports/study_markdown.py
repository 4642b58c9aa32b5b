"""report.md of a study: the answer and every number, for pasting into an issue or a paper's notes."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from fluxflow_train.reports.page import number, plain
from fluxflow_train.reports.study_words import between, fine, is_guided, level, missing, signed


def render(report: dict[str, Any]) -> str:
    """GitHub's Markdown."""
    answer, counts, gone = report["answer"], report["counts"], missing(report)
    lines = [f"# {word(report['study'])}", "", word(report["question"]), ""]
    lines += [f"**{word(answer['verdict'])}**: {word(answer['headline'])}", ""]
    lines += [f"- {word(sentence)}" for sentence in answer["sentences"]]
    lines += ["", f"Decision rule: {word(answer['rule'])}", ""]
    lines.append(f"{report['status']}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
    lines += ["", *(f"- **{word(warning)}**" for warning in report["warnings"])]
    for title, part, rows in (
        ("Size ratios", "ratios", ratios(report)),
        ("Arms", "cells", cells(report)),
        ("Paired differences", "comparisons", comparisons(report)),
        ("Tuning", "tuning", tuning(report)),
        ("Factorial", "factorial", factorial(report)),
        ("Rate and distortion", "rate_distortion", rate_distortion(report)),
        ("Health", "health", health(report)),
        ("Target rows", "targets", targets(report)),
        ("Failed, stopped and killed attempts", "failures", failures(report)),
        ("Runs", "runs", runs(report)),
    ):
        lines += ["", f"## {title}", ""]
        lines += [f"None: {word(gone[part])}."] if part in gone else rows
    lines += ["", "## Provenance", "", "```", report["provenance"]["command"], "```", ""]
    lines += [f"- {key.replace('_', ' ')}: {word(plain(value))}" for key, value in report["provenance"].items()]
    return "\n".join([*lines, ""])


def word(text: str) -> str:
    """Text on one line, without a meaning in Markdown or HTML."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "|`*_[]" else letter for letter in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def where(entry: dict[str, Any]) -> str:
    """The size, and the VAE where there are several."""
    size = word(entry["size"]) if entry["size"] else "all"
    return f"{size}, VAE {word(entry['vae'])}" if entry["vae"] else size


def share(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def cells(report: dict[str, Any]) -> list[str]:
    metric = report["metric"]
    heads = [
        "arm",
        "size",
        "n",
        label(report),
        f"{level(report)} interval",
        "parameters",
        "FLOPs per image",
        "residual",
        "seconds",
    ]
    guided = is_guided(report)
    heads += ["images/s", "MiB", "rate, nats", "learning rate", *["guidance"] * guided, "runs"]
    rows = [
        [
            word(c["arm"]),
            where(c),
            str(c["n"]),
            number(c["mean"], metric["unit"]),
            between(c, metric["unit"]),
            number(c["parameters"]),
            number(c["flops"]),
            share(c["residual"]),
            number(c["seconds"]),
            number(c["images_per_second"]),
            number(c["memory_mib"]),
            number(c["rate_nats"]),
            fine(c["learning_rate"]),
            *[fine(c["guidance"])] * guided,
            ", ".join(word(run) for run in c["runs"]),
        ]
        for c in report["cells"]
    ]
    return table(heads, rows)


def label(report: dict[str, Any]) -> str:
    metric = report["metric"]
    unit = f", {metric['unit']}" if metric["unit"] else ""
    return f"{word(metric['label'] + unit)} ({metric['better']} is better)"


def comparisons(report: dict[str, Any]) -> list[str]:
    unit = report["metric"]["unit"]
    heads = [
        "arm",
        "baseline",
        "size",
        "n",
        "difference (+ is better)",
        f"{level(report)} interval",
        "p",
        "p (Holm)",
        "correlation",
    ]
    heads += ["detectable", "margin", "equivalent", "p (equivalence)", "rates agree"]
    rows = [
        [
            word(c["arm"]),
            word(c["baseline"]),
            where(c),
            str(c["n"]),
            signed(c["difference"], unit),
            between(c, unit, sign=True),
            fine(c["p"]),
            fine(c["p_holm"]),
            fine(c["correlation"]),
            number(c["detectable"], unit),
            number(c["margin"], unit),
            yes(c["equivalent"]),
            fine(c["p_equivalent"]),
            yes(c["rates_agree"]),
        ]
        for c in report["comparisons"]
    ]
    return table(heads, rows)


def yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def ratios(report: dict[str, Any]) -> list[str]:
    heads = [
        "arm",
        "baseline",
        "VAE",
        "n",
        "size ratio",
        f"{level(report)} interval",
        "slope per e-fold",
        "curvature",
        "note",
    ]
    rows = [
        [
            word(r["arm"]),
            word(r["baseline"]),
            word(r["vae"] or ""),
            str(r["n"]),
            fine(r["ratio"]),
            between(r),
            f"{fine(r['slope'])} {between({'low': r['slope_low'], 'high': r['slope_high']})}",
            f"{fine(r['curvature']['estimate'])} {between(r['curvature'])}" if r["curvature"] else "",
            word(r["note"]),
        ]
        for r in report["ratios"]
    ]
    return table(heads, rows)


def tuning(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            word(t["arm"]),
            word(t["size"]),
            word(t["key"]),
            ", ".join(f"{choice(p)}: {number(p['mean'], report['metric']['unit'])}" for p in t["points"]),
            ("–" if t["chosen"] is None else choice(t["chosen"])) + (" (at the edge)" if t["edges"] else ""),
        ]
        for t in report["tuning"]
    ]
    return table(["arm", "size", "setting", f"{label(report)} by value", "chosen"], rows)


def choice(entry: dict[str, Any]) -> str:
    """A tuned value, with its guidance where that is tuned too."""
    return fine(entry["value"]) + ("" if entry["guidance"] is None else f" at guidance {fine(entry['guidance'])}")


def factorial(report: dict[str, Any]) -> list[str]:
    found, unit = report["factorial"], report["metric"]["unit"]
    if found is None:
        return []
    lines = table(
        ["VAE \\ flow", *(word(arm) for arm in found["flow_arms"])],
        [
            [word(arm), *(number(v, unit) for v in row)]
            for arm, row in zip(found["vae_arms"], found["cells"], strict=True)
        ],
    )
    effects = [(effect["label"], effect) for effect in found["effects"]]
    if found["common"]:
        effects.append((f"{found['common']['arm']} against {found['common']['baseline']}, common VAE", found["common"]))
    rows = [
        [word(name), signed(e["difference"], unit), between(e, unit, sign=True), fine(e["p"])] for name, e in effects
    ]
    return [*lines, "", *table(["effect", "difference (+ is better)", f"{level(report)} interval", "p"], rows)]


def rate_distortion(report: dict[str, Any]) -> list[str]:
    unit = report["metric"]["unit"]
    rows = [
        [
            word(r["arm"]),
            word(r["baseline"]),
            str(r["n"]),
            signed(r["difference"], unit),
            between(r, unit, sign=True),
            word(r["note"]),
        ]
        for r in report["rate_distortion"]
    ]
    return table(["arm", "baseline", "n", "difference at equal rate", f"{level(report)} interval", "note"], rows)


def health(report: dict[str, Any]) -> list[str]:
    rows = [
        [word(h["arm"]), where(h), *(share(h[field]) for field in ("dead", "saturated", "outside")), word(h["run"])]
        for h in report["health"]
    ]
    return table(["arm", "size", "dead", "saturated", "t outside [0, 1]", "run"], rows)


def targets(report: dict[str, Any]) -> list[str]:
    found = report["targets"]
    if found is None:
        return []
    heads = [
        "",
        "ReLU baseline, published",
        "Bezier, published",
        *(f"{word(arm)}, here" for arm in found["arms"]),
    ]
    rows = []
    for row in found["rows"]:
        measured = [row["values"].get(arm) for arm in found["arms"]]
        texts = ["not measured" if v is None else f"{number(v)} {word(row['unit'])}".strip() for v in measured]
        rows.append([word(row["label"]), *(word(text) for text in row["published"]), *texts, word(row["note"])])
    return [f"Measured on: {word(found['hardware'])}", "", *table([*heads, "note"], rows)]


def failures(report: dict[str, Any]) -> list[str]:
    rows = [
        [word(f["run"]), str(f["attempt"]), f["event"], word(f["time"]), word(f["error"]), yes(f["retried"])]
        for f in report["failures"]
    ]
    return table(["run", "attempt", "event", "time", "error", "retried"], rows)


def runs(report: dict[str, Any]) -> list[str]:
    heads = [
        "run",
        "status",
        "attempts",
        label(report),
        "images seen",
        "weights",
        "config",
        "host",
        "directory",
        "command",
    ]
    rows = [
        [
            word(r["name"]),
            r["status"],
            str(r["attempts"]),
            number(r["metric"], report["metric"]["unit"]),
            number(r["images_seen"]),
            (r["weights_sha256"] or "–")[:12],
            (r["config_sha256"] or "–")[:12],
            word(r["host"] or "–"),
            word(r["directory"]),
            word(r["command"]),
        ]
        for r in report["runs"]
    ]
    return table(heads, rows)
