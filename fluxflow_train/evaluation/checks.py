"""What must hold of an evaluation whatever the model is worth, and what follows for its status.

N pictures of the model, R real images, F feature width.
"""

from typing import Any

import torch
from torch import Tensor

from fluxflow_train.evaluation.results import Findings
from fluxflow_train.evaluation.samples import num_different
from fluxflow_train.evaluation.store import close
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.metrics.fid import torchmetrics_frechet
from fluxflow_train.metrics.kid import kid, pair_kernel
from fluxflow_train.reports.checks import MIN_IMAGES, check

KERNEL_IMAGES = 2048
ZERO_KID = 1e-9  # rounding of float64 sums over a few thousand values of about 1
ZERO_FRECHET = 1e-3  # of tr C: an eigenvalue's root amplifies rounding, 1e-16 to 1e-8, once for each dimension
CROSS_CHECK = 1e-4  # relative
NOT_AN_FID = "NOT AN FID: the extractor's weights are random"


def sample_checks(rows: dict[str, Tensor], expected: int) -> list[dict[str, Any]]:
    """Of what is stored of each picture, at every guidance."""
    count = len(rows["features"])
    nonfinite = int(rows["nonfinite"].sum()) + int((~rows["features"].isfinite()).any(1).sum())
    constant, different = int(rows["constant"].sum()), num_different(rows["sha256"])
    inputs = num_different(rows["input_sha256"]) if "input_sha256" in rows else count
    return [
        check("every image once", count == expected, f"{expected} expected, {count} measured"),
        check("finite outputs", nonfinite == 0, f"{nonfinite} images with NaN or Inf"),
        check("no constant pictures", constant == 0, f"{constant} pictures of a single value"),
        check("no picture twice", different >= inputs, f"{different} different pictures of {inputs} different sources"),
    ]


def fingerprint_check(reference: list[float], pictures: list[float]) -> dict[str, Any]:
    """Features of two machines or versions are no two samples of one thing."""
    apart = max((abs(a - b) for a, b in zip(reference, pictures, strict=True)), default=0.0)
    return check(
        "one extractor made the reference's features and the pictures'",
        close(reference, pictures),
        f"features of 8 fixed images differ by {apart:.2g}",
    )


def reference_checks(real: Tensor) -> list[dict[str, Any]]:
    """The reference (R, F) against itself."""
    checks = []
    if len(real) >= 2:
        value = kid(pair_kernel(real[:KERNEL_IMAGES], real[:KERNEL_IMAGES]))
        distance = torchmetrics_frechet(real, real)
        spread = max(float(real.double().var(0).sum()), torch.finfo(torch.float64).tiny)
        checks += [
            check("KID of the reference against itself", abs(value) < ZERO_KID, f"{value:.2g}, as it must be"),
            check(
                "Frechet distance of the reference against itself",
                abs(distance) < ZERO_FRECHET * spread,
                f"{distance:.2g}, of a variance of {spread:.3g}",
            ),
        ]
    return checks


def estimator_checks(findings: Findings, kid_name: str) -> list[dict[str, Any]]:
    """The second route to the Frechet distance, and that the yardsticks stand in their order."""
    checks = []
    if findings.cross_checks:
        worst = max(deviation / max(abs(value), 1) for value, deviation in findings.cross_checks)
        checks.append(
            check("Frechet distance by another route", worst < CROSS_CHECK, f"relative difference {worst:.2g}")
        )
    floor, rough = findings.entry(f"{kid_name}_noise_floor"), findings.entry(f"{kid_name}_degraded")
    if floor is not None and rough is not None and floor["n_real"] >= MIN_IMAGES // 2:  # of fewer the floor is chance
        least = floor["interval"][0] if floor["interval"] else floor["raw"]
        checks.append(
            check(
                "real images are nearer to real ones than to degraded ones",
                least < rough["raw"],
                f"KID {floor['raw']:.3g} (from {least:.3g}) and {rough['raw']:.3g}",
            )
        )
    return checks


def status_of(
    checks: list[dict[str, Any]], model: dict[str, Any], extractor: Extractor, num_images: int, wanted: int
) -> tuple[str, list[str]]:
    """("final" | "partial" | "smoke", reasons).

    smoke: the numbers are no result (a failed check, random weights, an untrained model). partial: right, but of fewer
    images than the protocol's `wanted`, or too few.
    """
    failed = [f"failed: {c['name']} ({c['detail']})" for c in checks if not c["passed"]]
    if extractor.is_random:
        failed.insert(0, NOT_AN_FID)
    if model.get("images_seen") == 0:
        failed.append("the model is untrained")
    missing = []
    if num_images < wanted:
        missing.append(f"only {num_images:,} of the protocol's {wanted:,} images")
    if num_images < MIN_IMAGES:
        missing.append(f"only {num_images} images: a final report needs {MIN_IMAGES}")
    if failed:
        return "smoke", failed + missing
    return ("partial", missing) if missing else ("final", [])
