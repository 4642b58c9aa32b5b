"""What a study's report shows beside its statistics: curves, health, pictures, targets, provenance, warnings."""

import numpy as np

from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.plan import Plan
from fluxflow_train.ablation.results import Record, Results

SHARES = ("dead", "saturated", "outside")
HEADS = "trainable_bezier"  # the last functions of mu, logvar and RGB, the same for all arms: no part of the shares
TRAINING = 3  # a backward costs two forwards, as everywhere
# Source: the "Performance targets" of the model family's public page: ReLU baseline, Bezier.
PUBLISHED = {
    "parameters": ("Parameters", "", ("500 M", "183 M")),
    "seconds": ("Inference time, 512 px, 50 steps", "s", ("1.82 s (A100)", "1.12 s (A100)")),
    "memory_gib": ("Training memory, batch 2", "GiB", ("10.2 GB", "4.1 GB")),
    "fid": ("FID, COCO val", "", ("15.2 ± 0.3", "≤ 15.0")),
}


def curves(results: Results) -> list[Record]:
    """The validation curve of the metric (the loss, where validation has no such metric): mean and range over seeds."""
    found, plan = [], results.frozen.plan
    for (arm, size, vae), records in by_cell(results).items():
        known = [record["curves"] for record in records]
        name = next((n for n in (f"val/{plan.metric.name}", "val/loss") if all(n in k for k in known)), None)
        if name is None:
            continue
        images = known[0][name]["images"]
        values = np.array([np.interp(images, k[name]["images"], k[name]["values"]) for k in known])
        seconds = np.mean([record["seconds"] / record["images_seen"] for record in records])
        found.append(
            {"arm": arm, "size": size, "vae": vae, "name": name, "images": images}
            | {
                key: getattr(values, how)(0).tolist()
                for key, how in (("mean", "mean"), ("low", "min"), ("high", "max"))
            }
            | {"flops_per_image": float(TRAINING * results.frozen.networks[arm][size]["flops"])}
            | {"seconds_per_image": float(seconds)}
        )
    return found


def by_cell(results: Results) -> dict[tuple[str, str, str | None], list[Record]]:
    """Records of finished runs by (arm, size, vae), sizes ascending, seeds in the plan's order."""
    found: dict[tuple[str, str, str | None], list[Record]] = {}
    for size in results.sizes:
        for vae in results.vaes:
            for arm in results.frozen.plan.arms:
                seeds = results.seeds([arm], [size], [vae])
                if seeds:
                    found[arm, size, vae] = [results.records[arm, size, vae, seed] for seed in seeds]
    return found


def health(results: Results) -> list[Record]:
    """Of the first seed's run of each cell, as its health callback left it."""
    found = []
    for (arm, size, vae), records in by_cell(results).items():
        content = records[0]["health"]
        if content is None:
            continue
        layers = content["layers"]
        name = results.names[arm, size, vae, records[0]["seed"]]
        own = [layer for layer in layers if layer["kind"] != HEADS]
        shares = {key: [layer[key] for layer in own if layer.get(key) is not None] for key in SHARES}
        found.append(
            {"arm": arm, "size": size, "vae": vae, "run": name, "layers": layers}
            | {key: float(np.mean(values)) if values else None for key, values in shares.items()}
            | {"curves": content.get("curves", []), "densities": content.get("densities", [])}
        )
    return found


def pictures(results: Results) -> list[Record]:
    """Of the first seed for which all arms have finished, at the largest size, on the first VAE: the same inputs."""
    size, vae, arms = results.sizes[-1], results.vaes[0], list(results.frozen.plan.arms)
    seeds = results.seeds(arms, [size], [vae])
    if not seeds:
        return []
    shown = {arm: {p["key"]: p for p in results.records[arm, size, vae, seeds[0]]["pictures"]} for arm in arms}
    return [
        {"key": key, "caption": first["caption"], "size": size, "vae": vae, "input": first["input"]}
        | {"arms": {arm: shown[arm][key]["output"] for arm in arms}}
        for key, first in shown[arms[0]].items()
        if all(key in shown[arm] for arm in arms)
    ]


def targets(frozen: Frozen, measured: dict[str, Record]) -> Record:
    """The four rows of the project page's table: measured for every arm at its largest, or empty with the cause."""
    rows = []
    for name, (label, unit, published) in PUBLISHED.items():
        entries = {arm: measured[arm]["rows"][name] if arm in measured else None for arm in frozen.plan.arms}
        notes = sorted({entry["note"] for entry in entries.values() if entry})
        rows.append(
            {"name": name, "label": label, "unit": unit, "published": list(published)}
            | {"values": {arm: entry and entry["value"] for arm, entry in entries.items()}}
            | {"note": "; ".join(notes) or "not measured: the plan has targets: false, or its runs have not finished"}
            | {"runs": {arm: record["measured_run"] for arm, record in measured.items()}}
        )
    hardware = sorted({record["hardware"] for record in measured.values()})
    return {"arms": list(frozen.plan.arms), "hardware": "; ".join(hardware), "rows": rows}


def provenance(frozen: Frozen, finished: dict[str, Record], ledger: str, command: str) -> Record:
    trained = finished.values()
    versions: dict[str, set[str]] = {}
    for record in trained:
        for key, value in record["environment"].items():
            versions.setdefault(key, set()).add(str(value))
    return {
        "plan_hash": frozen.plan.hash,
        "plan": frozen.plan.content,
        "frozen": frozen.origin["time"],
        "group": frozen.group,
        "git": {"frozen": frozen.origin["git"], "runs": sorted({record["git"] for record in trained})},
        "versions": {key: ", ".join(sorted(values)) for key, values in versions.items()},
        "hosts": sorted({record["host"] for record in trained}),
        "ledger": ledger,
        "command": command,
    }


def warnings(report: Record, finished: dict[str, Record], plan: Plan) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    if len(report["provenance"]["git"]["runs"]) > 1:
        found.append("The runs were made by different versions of the code")
    unsure = [name for name, record in finished.items() if record["report_status"] != "final"]
    if unsure:
        found.append(f"{len(unsure)} runs have reports that are not final, the first of them {unsure[0]}")
    edges = [f"{row['arm']} ({value:g})" for row in report["tuning"] for value in row["edges"]]
    if edges:
        found.append(f"Tuned values at an end of the grid, where a better one may lie beyond: {', '.join(edges)}")
    apart = sorted({row["baseline"] for row in report["comparisons"] if row["rates_agree"] is False})
    if apart:
        found.append(
            f"Rates differ by more than 5 % from {', '.join(apart)}: compare by the rate-distortion rows, not by "
            "quality alone"
        )
    bent = [row["baseline"] for row in report["ratios"] if excludes_zero(row["curvature"])]
    if bent:
        found.append(
            f"Quality is not straight in log size against {', '.join(bent)}: the ratio holds between these sizes only"
        )
    turned = [row["baseline"] for row in report["ratios"] if excludes_zero(row["slope_difference"])]
    if turned:
        found.append(f"The slopes of the two arms differ against {', '.join(turned)}: the ratio depends on the size")
    lost = sorted(
        {(run["arm"], run["seed"]) for run in report["runs"] if (run["phase"], run["status"]) == ("main", "failed")}
    )
    if lost:
        words = ", ".join(f"{arm} (seed {seed})" for arm, seed in lost)
        found.append(f"Runs of {words} failed: their seeds are left out of the comparisons, which favours these arms")
    mixed = [name for name, digests in configurations(report, finished).items() if len(digests) > 1]
    if mixed:
        found.append(f"The seeds of {', '.join(mixed)} were not trained with one configuration")
    if report["ratios"] and len(plan.sizes) == 2:
        found.append("Two sizes can't show whether quality is straight in log size")
    if len(plan.seeds) < 3:
        found.append(f"{len(plan.seeds)} seed(s): the intervals are very wide, and no pair correlation can be told")
    largest = max((cell["residual"] or 0 for cell in report["cells"]), key=abs, default=0.0)
    if abs(largest) > plan.tolerance:
        found.append(f"An arm is {largest:+.1%} from what it was matched to")
    return found


def configurations(report: Record, finished: dict[str, Record]) -> dict[str, set[str]]:
    """Digests of the configurations of each cell's runs, but for what differs between seeds."""
    return {
        f"{cell['arm']} {cell['size']}": {finished[name]["compared_sha256"] for name in cell["runs"]}
        for cell in report["cells"]
    }


def excludes_zero(interval: Record | None) -> bool:
    if interval is None or interval["low"] is None or interval["high"] is None:
        return False
    return interval["low"] > 0 or interval["high"] < 0
