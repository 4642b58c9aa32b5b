"""Self-checks of an evaluation, and the status that follows from them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxflow_train.metrics.kid import kid, pair_kernel
from fluxflow_train.metrics.reconstruction import psnr
from fluxflow_train.reports.drawing import Drawn
from fluxflow_train.reports.passes import SplitPass, is_constant

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
            checks.append(reference_check(real))
    return checks


def run_drawing_checks(drawn: Drawn, indices: list[int], expected: int, real: Tensor | None) -> list[dict[str, Any]]:
    """What must hold of drawn pictures whatever they show; `real` features (N, F) of the reference."""
    images = drawn.images
    distinct = len({image.numpy().tobytes() for image in images})
    constant = int(is_constant(images).sum())
    checks = [
        check(
            "every caption once",
            len(images) == len(set(indices)) == expected,
            f"{expected} expected, {len(images)} drawn, {len(set(indices))} different ones",
        ),
        check(
            "finite outputs", drawn.num_nonfinite == 0, f"{drawn.num_nonfinite} outputs of a network with NaN or Inf"
        ),
        check("no constant pictures", constant == 0, f"{constant} pictures of a single value"),
        check("no picture twice", distinct == len(images), f"{distinct} different pictures of {len(images)}"),
        check(
            "a picture drawn again, alone, is the same",
            bool((drawn.again == images[0]).all()),
            "byte for byte" if bool((drawn.again == images[0]).all()) else "another picture",
        ),
    ]
    if real is not None and len(real) >= 2:
        checks.append(reference_check(real))
    return checks


def reference_check(real: Tensor) -> dict[str, Any]:
    """The kernel distance of features (N, F) to themselves."""
    value = kid(pair_kernel(real, real))
    return check("KID of the reference against itself", abs(value) < ZERO, f"{value:.2g}, as it must be")


def status_of(
    checks: list[dict[str, Any]],
    model: dict[str, Any],
    num_images: int,
    has_features: bool,
    missing: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """("final" | "partial" | "smoke", reasons).

    smoke: the numbers are no result (a failed check, an untrained model). partial: right, but not all there, for want
    of images, of features, or of what `missing` names.
    """
    failed = [f"failed: {c['name']} ({c['detail']})" for c in checks if not c["passed"]]
    if model.get("images_seen") == 0:
        failed.append("the model is untrained")
    missing = list(missing)
    if num_images < MIN_IMAGES:
        missing.append(f"only {num_images} images: a final report needs {MIN_IMAGES}")
    if not has_features:
        missing.append("no feature distances")
    if failed:
        return "smoke", failed + missing
    return ("partial", missing) if missing else ("final", [])
