"""Self-checks of an evaluation, and the status that follows from them."""

import math
from typing import Any

import torch

from fluxflow_train.metrics.kid import kid, pair_kernel
from fluxflow_train.metrics.reconstruction import psnr
from fluxflow_train.reports.passes import SplitPass

MIN_IMAGES = 64
# Rounding of float64 sums over a few thousand kernel values of about 1.
ZERO = 1e-9


def check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail}


def run_checks(measured: SplitPass, expected: int) -> list[dict[str, Any]]:
    """What must hold whatever the model is worth."""
    count, unique = len(measured.indices), len(set(measured.indices))
    images = torch.stack([e.image for e in measured.examples])
    itself = psnr(images, images)
    checks = [
        check(
            "every image once",
            count == unique == expected,
            f"{expected} expected, {count} measured, {unique} distinct",
        ),
        check(
            "finite outputs",
            measured.num_nonfinite == 0 and all(map(math.isfinite, measured.rates)),
            f"{measured.num_nonfinite} reconstructions with NaN or Inf",
        ),
        check(
            "no constant outputs",
            measured.num_constant == 0,
            f"{measured.num_constant} reconstructions of a single value",
        ),
        check("PSNR of an image against itself", bool(itself.isinf().all()), "infinite, as it must be"),
    ]
    if measured.features:
        real = measured.all_features("real")
        if len(real) >= 2:
            value = kid(pair_kernel(real, real))
            checks.append(
                check("KID of the reference against itself", abs(value) < ZERO, f"{value:.2g}, as it must be")
            )
    return checks


def status_of(
    checks: list[dict[str, Any]], model: dict[str, Any], num_images: int, has_features: bool
) -> tuple[str, list[str]]:
    """("final" | "partial" | "smoke", reasons).

    smoke: the numbers are no result (a failed check, an untrained model). partial: right, but not all there.
    """
    failed = [f"failed: {c['name']} ({c['detail']})" for c in checks if not c["passed"]]
    if model.get("images_seen") == 0:
        failed.append("the model is untrained")
    missing = []
    if num_images < MIN_IMAGES:
        missing.append(f"only {num_images} images: a final report needs {MIN_IMAGES}")
    if not has_features:
        missing.append("no feature distances")
    if failed:
        return "smoke", failed + missing
    return ("partial", missing) if missing else ("final", [])
