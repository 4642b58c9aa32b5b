"""The dictionary that becomes `report.json` (schema fid_report/v1), from what is stored."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxflow_train.evaluation.checks import (
    estimator_checks,
    fingerprint_check,
    reference_checks,
    sample_checks,
    status_of,
)
from fluxflow_train.evaluation.extractors import distance_name
from fluxflow_train.evaluation.images import Images, text_digest
from fluxflow_train.evaluation.protocol import Protocol
from fluxflow_train.evaluation.reference import RealFeatures
from fluxflow_train.evaluation.results import Findings
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.reports.build import SCHEMA
from fluxflow_train.reports.protocol import environment

KIND = "evaluation"
SEED_RULE = "noise from (seed, 'sample-noise', number of the image); subsets of the estimators from (seed, their name)"


@dataclass
class Measured:
    """One set of pictures: its guidance (None for reconstructions), its stored rows, their extractor's fingerprint, and
    what came of them."""

    guidance: float | None
    rows: dict[str, Tensor]
    fingerprint: list[float]
    findings: Findings


@dataclass
class Setting:
    """What was measured on, with what."""

    protocol: Protocol
    images: Images
    count: int
    wanted: int
    real: RealFeatures
    extractor: Extractor
    described: dict[str, Any]
    device: torch.device
    seed: int
    world: int


def report_of(
    setting: Setting, measured: list[Measured], model: dict[str, Any], provenance: dict[str, Any], shown: dict[str, Any]
) -> dict[str, Any]:
    """The report, of the first of `measured`; the others stand in `sweep`."""
    head, extractor, protocol = measured[0], setting.extractor, setting.protocol
    checks = all_checks(setting, measured)
    status, reasons = status_of(checks, model, extractor, setting.count, setting.wanted)
    drawn = head.guidance is not None
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "status": status,
        "status_reasons": reasons,
        "command": provenance["command"],
        "results": head.findings.results,
        "sweep": [{"guidance": m.guidance, "results": m.findings.results} for m in measured] if drawn else [],
        "protocol": describe_protocol(protocol, setting.count),
        "reference": {
            "dataset": protocol.dataset,
            "split": setting.real.images.split,
            "list_sha256": setting.real.images.list_sha256,
            "statistics_sha256": setting.real.sha256,
            "images": len(setting.real.features),
            **provenance.get("reference", {}),
        },
        "samples": {
            "prompts_sha256": text_digest(setting.images.captions(range(setting.count))) if drawn else None,
            "list_sha256": text_digest(setting.images.keys[: setting.count]),
            "expected": setting.count,
            "synced": len(head.rows["features"]),
            "unique": len({bytes(row) for row in head.rows["sha256"].tolist()}),
            "seed": setting.seed,
            "seed_rule": SEED_RULE if drawn else "the posterior mean: no noise",
        },
        "extractor": setting.described,
        "estimator": head.findings.estimator,
        "model": model,
        "environment": environment(setting.device) | {"world_size": setting.world} | provenance.get("environment", {}),
        "checks": checks,
        "cost": {"seconds_model": round(sum(float(m.rows["seconds"].sum()) for m in measured), 2)}
        | provenance.get("cost", {}),
        "warnings": head.findings.warnings + provenance.get("warnings", []),
        "figures": shown,
    }


def describe_protocol(protocol: Protocol, count: int) -> dict[str, Any]:
    """The page's words, and all that the hash covers."""
    return {
        "id": protocol.id,
        "hash": protocol.hash,
        "dataset": protocol.dataset,
        "split": protocol.split,
        "resolution": protocol.resolution,
        "num_images": count,
        "resizer": protocol.resizer,
        "extractor": protocol.extractor_name,
        "title": protocol.title,
        "content": protocol.content,
    }


def all_checks(setting: Setting, measured: list[Measured]) -> list[dict[str, Any]]:
    """Of every guidance; named by it where there are several."""
    kid_name = f"kid_{setting.extractor.name}"
    checks = reference_checks(setting.real.features)
    for one in measured:
        mine = [fingerprint_check(setting.real.fingerprint, one.fingerprint)]
        mine += sample_checks(one.rows, setting.count) + estimator_checks(one.findings, kid_name)
        suffix = f", guidance {one.guidance:g}" if len(measured) > 1 else ""
        checks += [entry | {"name": entry["name"] + suffix} for entry in mine]
    return checks


def front(setting: Setting, measured: list[Measured]) -> dict[str, Any]:
    """The figures over guidance and over the number of images."""
    kid_name = f"kid_{setting.extractor.name}"
    points, sizes = [], []
    for one in measured:
        frechet = frechet_name(one.findings, setting.extractor)
        names = {"frechet": frechet, "kid": kid_name, "clip_score": "clip_score"}
        names |= {name: name for name in ("precision", "recall", "density", "coverage")}
        point = {key: None if name is None else one.findings.value(name) for key, name in names.items()}
        points.append({"guidance": one.guidance, "frechet_name": frechet, "kid_name": kid_name, **point})
        if one.findings.by_size is not None:
            sizes.append({"guidance": one.guidance, **one.findings.by_size})
    return {"pareto": points if len(points) > 1 else [], "frechet_by_size": sizes}


def frechet_name(findings: Findings, extractor: Extractor) -> str | None:
    """Of the distance that was taken, in all dimensions or on components; None where there are too few images."""
    names = (distance_name(extractor), f"frechet_pca{min(64, extractor.num_features)}_{extractor.name}")
    return next((name for name in names if findings.value(name) is not None), None)
