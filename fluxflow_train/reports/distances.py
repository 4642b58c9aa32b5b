"""Feature distances between a split and its reconstructions, by the rule for small sets (EVALUATION.md 2).

N images of the split, M of the training draw, D feature width.
"""

from typing import Any

from torch import Tensor

from fluxflow_train.metrics.features import NAME, paired_distance
from fluxflow_train.metrics.frechet import Projection, enough_images, fit_projection, frechet_of_features
from fluxflow_train.metrics.intervals import HALVES_METHOD, halves_interval
from fluxflow_train.metrics.kid import kid, pair_kernel
from fluxflow_train.reports.passes import SplitPass
from fluxflow_train.reports.results import Result, mean_result, result

PROJECTION_IMAGES = 512
PROJECTION_DIMENSION = 64
MAX_FLOOR = 5000
MAX_KERNEL = 5000
NUM_HALVES = 200
FRECHET_LABEL = f"Frechet distance, {PROJECTION_DIMENSION} components"
FLOOR_NOTE = "two disjoint sets of real images of this size; a reconstruction of the same images can fall below it"


def feature_results(
    measured: SplitPass, train: Tensor | None, seed: int
) -> tuple[list[Result], dict[str, Any], list[str]]:
    """Paired distance, KID and PCA-64 Frechet distance, each beside PCA and real against real; estimator; warnings."""
    sets = {name: measured.all_features(name) for name in ("real", "model", "pca")}
    n = len(sets["real"])
    warnings: list[str] = []
    if train is not None and len(train) >= PROJECTION_IMAGES + n:
        sets["noise_floor"] = train[PROJECTION_IMAGES : PROJECTION_IMAGES + n]
    else:
        warnings.append(f"no real-against-real noise floor: the training split has too few images for {n} of its own")
    results = paired_results(sets)
    estimator: dict[str, Any] = {"paired": "Euclidean, 1280-d", "kid": "unbiased paired U-statistic, cubic kernel"}
    if n >= 2:
        results += kid_results(sets, seed)
    if not enough_images(n, PROJECTION_DIMENSION) or train is None or len(train) < PROJECTION_IMAGES:
        warnings.append(
            f"no Frechet distance: {PROJECTION_DIMENSION} dimensions need {5 * PROJECTION_DIMENSION} images "
            f"(got {n}) and {PROJECTION_IMAGES} training images; use the paired distance and KID"
        )
        return results, estimator, warnings
    more, check = frechet_results(sets, train[:PROJECTION_IMAGES])
    estimator["frechet"] = {
        "dimension": PROJECTION_DIMENSION,
        "fitted_on": f"{PROJECTION_IMAGES} training images",
        "trace_cross_check": check,
    }
    return results + more, estimator, warnings


def rival_words(name: str, rival: str) -> dict[str, Any]:
    """How a baseline of result `name` is labelled."""
    title = {"pca": "PCA", "noise_floor": "real against real"}[rival]
    return {"label": title, "baseline_of": name, "baseline": rival, "note": FLOOR_NOTE if rival != "pca" else ""}


def paired_results(sets: dict[str, Tensor]) -> list[Result]:
    """Mean distance of each image to its own reconstruction; for scale, to another image of the split."""
    name = f"paired_distance_{NAME}"
    words = {"unit": "", "better": "lower"}
    real = sets["real"]
    rivals = (
        ("pca", "PCA", sets["pca"]),
        ("another_image", "another image of the split", real.roll(1, 0)),
    )
    results = [
        mean_result(
            name, paired_distance(real, sets["model"]).tolist(), label="Feature distance, image to its copy", **words
        )
    ]
    for rival, label, other in rivals:
        values = paired_distance(real, other).tolist()
        results.append(mean_result(f"{name}_{rival}", values, label=label, baseline_of=name, baseline=rival, **words))
    return results


def kid_results(sets: dict[str, Tensor], seed: int) -> list[Result]:
    """Kernel distance to the model's reconstructions and to each rival."""
    name = f"kid_{NAME}"
    results = []
    for rival in ("model", "pca", "noise_floor"):
        if rival not in sets:
            continue
        words: dict[str, Any] = {"label": "Kernel distance (KID)"} if rival == "model" else rival_words(name, rival)
        results.append(
            kid_result(name if rival == "model" else f"{name}_{rival}", sets["real"], sets[rival], seed, **words)
        )
    return results


def kid_result(name: str, real: Tensor, other: Tensor, seed: int, **words: Any) -> Result:
    """Kernel distance of two sets as large as the smaller, at most 5,000, with an interval from half samples."""
    n = min(len(real), len(other), MAX_KERNEL)
    h = pair_kernel(real[:n], other[:n])
    return result(
        name,
        kid(h),
        unit="",
        better="lower",
        num_images=n,
        interval=halves_interval(lambda s: kid(h[s][:, s]), n, seed, NUM_HALVES) if n >= 4 else None,
        interval_method=HALVES_METHOD.format(num=NUM_HALVES),
        **words,
    )


def frechet_results(sets: dict[str, Tensor], fit: Tensor) -> tuple[list[Result], float]:
    """Frechet distance on the 64 leading components of training features, and the worst trace cross-check."""
    name = f"frechet_pca{PROJECTION_DIMENSION}_{NAME}"
    projection = fit_projection(fit, PROJECTION_DIMENSION)
    results, checks = [], []
    for rival in ("model", "pca", "noise_floor"):
        if rival not in sets:
            continue
        words: dict[str, Any] = {"label": FRECHET_LABEL} if rival == "model" else rival_words(name, rival)
        entry, check = frechet_result(
            name if rival == "model" else f"{name}_{rival}", sets["real"], sets[rival], projection, **words
        )
        results.append(entry)
        checks.append(check)
    return results, max(checks)


def frechet_result(
    name: str, real: Tensor, other: Tensor, projection: Projection, **words: Any
) -> tuple[Result, float]:
    """Frechet distance of two sets of features on a projection, and its trace cross-check."""
    distance = frechet_of_features(projection(real), projection(other))
    size = min(len(real), len(other))
    return result(name, distance.value, unit="", better="lower", num_images=size, **words), distance.cross_check
