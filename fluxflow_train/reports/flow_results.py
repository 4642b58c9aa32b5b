"""The numbers of a text-to-image report: validation loss, distances to real images, what captions change, the cost.

N drawn images, M training images, F feature width, P prompts, K noises.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxflow_train import rng
from fluxflow_train.metrics.features import NAME
from fluxflow_train.metrics.frechet import enough_images, fit_projection
from fluxflow_train.metrics.intervals import halves_interval
from fluxflow_train.metrics.kid import polynomial_kernel
from fluxflow_train.objectives import Objective
from fluxflow_train.reports.distances import (
    FRECHET_LABEL,
    NUM_HALVES,
    PROJECTION_DIMENSION,
    PROJECTION_IMAGES,
    frechet_result,
    kid_result,
)
from fluxflow_train.reports.real_images import distances
from fluxflow_train.reports.results import Result, mean_result, result

RIVALS = {
    "reconstruction": "VAE alone, of real images",
    "noise_floor": "real against real",
    "noise": "decoded noise",
}
FLOOR_NOTE = "two disjoint sets of training images of the same size: what chance alone makes of equal distributions"
KID_NOTE = "of the pictures drawn for the captions of the split to the split's own images; 0 is a perfect model"
TRAIN_NOTE = "the training images may show other things than the split: its own real images are the yardstick"
TRAIN_METHOD = "2.5 to 97.5 % of {num} random halves of the smaller set, the training images whole"
FRECHET = f"frechet_pca{PROJECTION_DIMENSION}_{NAME}"
QUARTERS = 4
PIECE = 512


def loss_results(
    curves: dict[str, dict[str, list[float]]], num_tune: int, zero: float, images_seen: int | None
) -> list[Result]:
    """The last validation loss in `metrics.csv`, of the averaged weights that were exported; null if there is none."""
    note = "mean squared error at fixed times and noise on the split tune, of the averaged weights"
    found = curves.get("val/loss")
    if found is not None and images_seen is not None and found["x"][-1] != images_seen:
        note += f"; measured after {found['x'][-1]:,.0f} images"
    results = [
        result(
            "loss",
            found["y"][-1] if found is not None else math.nan,
            label="Validation loss",
            unit="",
            better="lower",
            num_images=num_tune,
            note=note,
        ),
        result(
            "loss_zero",
            zero,
            label="predicting zero",
            unit="",
            better="lower",
            num_images=num_tune,
            baseline_of="loss",
            baseline="zero",
            note="the loss of a network that always says 0, on the images of the evaluated split",
        ),
    ]
    for i in range(QUARTERS):
        name = f"val/loss_t{i}"
        if name in curves:
            label = f"Validation loss, t {i / QUARTERS:g} to {(i + 1) / QUARTERS:g}"
            last = curves[name]["y"][-1]
            results.append(result(f"loss_t{i}", last, label=label, unit="", better="lower", num_images=num_tune // 4))
    return results


def zero_loss(objective: Objective, z: Tensor, seed: int) -> float:
    """Mean squared target over latents z (N, D, h, w), each at a stratum of t of its own."""
    t = (torch.arange(len(z)) + 0.5) / len(z)
    eps = rng.normal(seed, "report-zero", [(i,) for i in range(len(z))], tuple(z.shape[1:]))
    return float(objective.target(z, eps, t).double().square().mean())


# ---- distances ----


def kid_results(sets: dict[str, Tensor], train: Tensor, seed: int) -> tuple[list[Result], list[str]]:
    """KID of the drawn images, "drawn", to the split's own, "real", and to the training images (M, F); warnings."""
    n = len(sets["real"])
    warnings = []
    results = [kid_result("kid", sets["real"], sets["drawn"], seed, label="Kernel distance (KID)", note=KID_NOTE)]
    for rival, label in RIVALS.items():
        words: dict[str, Any] = {"label": label, "baseline_of": "kid", "baseline": rival}
        if rival != "noise_floor":
            results.append(kid_result(f"kid_{rival}", sets["real"], sets[rival], seed, **words))
        elif len(train) >= 2 * n:
            floor = kid_result(f"kid_{rival}", train[:n], train[n : 2 * n], seed, note=FLOOR_NOTE, **words)
            results.append(floor)
        else:
            warnings.append(f"no real-against-real noise floor: {len(train)} training images are no two sets of {n}")
    results.append(kid_to_train("kid_train", train, sets["drawn"], seed, label="KID to the training images"))
    for rival, label in {"split": "the split's own images", **RIVALS}.items():
        if rival != "noise_floor":
            words = {"label": label, "baseline_of": "kid_train", "baseline": rival}
            note = TRAIN_NOTE if rival == "split" else ""
            other = sets["real" if rival == "split" else rival]
            results.append(kid_to_train(f"kid_train_{rival}", train, other, seed, note=note, **words))
    return results, warnings


def kid_to_train(name: str, train: Tensor, other: Tensor, seed: int, **words: Any) -> Result:
    """Unbiased kernel distance of sets of different sizes, features (M, F) and (N, F).

    Source: Gretton et al. 2012, "A kernel two-sample test", eq. 3.
    """
    x, y = train.double(), other.double()
    own = float(sum(polynomial_kernel(piece, x).sum() for piece in x.split(PIECE)))
    own -= float(((x.square().sum(1) / x.shape[1] + 1) ** 3).sum())
    own /= len(x) * (len(x) - 1)
    cross, inside = polynomial_kernel(y, x).mean(1), polynomial_kernel(y, y)

    def estimate(chosen: Any) -> float:
        k, n = inside[chosen][:, chosen], len(chosen)
        return own + float((k.sum() - k.diagonal().sum()) / (n * (n - 1)) - 2 * cross[chosen].mean())

    n = len(y)
    interval = halves_interval(estimate, n, seed, NUM_HALVES) if n >= 4 else None
    entry = result(
        name,
        estimate(torch.arange(n).numpy()),
        unit="",
        better="lower",
        num_images=n,
        interval=interval,
        interval_method=TRAIN_METHOD.format(num=NUM_HALVES),
        **words,
    )
    return entry | {"n_real": len(x)}


def swept_results(real: Tensor, drawn: Tensor, train: Tensor, seed: int) -> list[Result]:
    """Distances of the images of one guidance scale, features (N, F), by the names and rules of the report's own."""
    if len(real) < 2 or len(train) < 2:
        return []
    results = [
        kid_result("kid", real, drawn, seed, label="Kernel distance (KID)", note=KID_NOTE),
        kid_to_train("kid_train", train, drawn, seed, label="KID to the training images"),
    ]
    if enough_for_frechet(len(real), len(train)):
        projection = fit_projection(train[:PROJECTION_IMAGES], PROJECTION_DIMENSION)
        results.append(frechet_result(FRECHET, real, drawn, projection, label=FRECHET_LABEL)[0])
    return results


def enough_for_frechet(num_images: int, num_train: int) -> bool:
    """Whether a split, and the training images that the components are fitted on, are large enough."""
    return enough_images(num_images, PROJECTION_DIMENSION) and num_train >= PROJECTION_IMAGES + num_images


def frechet_results(sets: dict[str, Tensor], train: Tensor) -> tuple[list[Result], dict[str, Any], list[str]]:
    """Frechet distance on 64 components of training features, where the sets are large enough; estimator; warnings."""
    n, wanted = len(sets["real"]), PROJECTION_IMAGES + len(sets["real"])
    if not enough_for_frechet(n, len(train)):
        return (
            [],
            {},
            [
                f"no Frechet distance: {PROJECTION_DIMENSION} dimensions need {5 * PROJECTION_DIMENSION} images "
                f"(got {n}) and {wanted} training images (got {len(train)}); use KID"
            ],
        )
    projection = fit_projection(train[:PROJECTION_IMAGES], PROJECTION_DIMENSION)
    entry, check = frechet_result(FRECHET, sets["real"], sets["drawn"], projection, label=FRECHET_LABEL)
    results, checks = [entry], [check]
    for rival, label in RIVALS.items():
        other = train[PROJECTION_IMAGES:wanted] if rival == "noise_floor" else sets[rival]
        words: dict[str, Any] = {"label": label, "baseline_of": FRECHET, "baseline": rival}
        if rival == "noise_floor":
            words["note"] = "training images against the split's: the Frechet distance is above 0 by chance alone"
        entry, check = frechet_result(f"{FRECHET}_{rival}", sets["real"], other, projection, **words)
        results.append(entry)
        checks.append(check)
    estimator = {
        "dimension": PROJECTION_DIMENSION,
        "fitted_on": f"{PROJECTION_IMAGES} training images",
        "trace_cross_check": max(checks),
    }
    return results, {"frechet": estimator}, []


def nearest_results(drawn: Tensor, real: Tensor, train: Tensor, unit: str) -> list[Result]:
    """Mean distance of each image (N, F) to its nearest training image, drawn beside real."""
    words: dict[str, Any] = {"unit": unit, "better": None}
    name = "nearest_train"
    return [
        mean_result(
            name,
            distances(drawn, train).amin(1).tolist(),
            label="Distance to the nearest training image",
            note="far below that of the split's own images, the model would be copying",
            **words,
        ),
        mean_result(
            f"{name}_split",
            distances(real, train).amin(1).tolist(),
            label="the split's own images",
            baseline_of=name,
            baseline="split",
            **words,
        ),
    ]


# ---- captions and cost ----


def caption_results(by_noise: Tensor) -> list[Result]:
    """How much the caption and the noise each change, in mean absolute grey levels; by_noise (P, K, 3, H, W) uint8."""
    flat = by_noise.flatten(2).float()
    return [
        result(
            "caption_effect",
            mean_difference(list(flat.unbind(1))),
            label="Change by the caption",
            num_images=flat.shape[0] * flat.shape[1],
            note="mean absolute difference of pixels between captions at equal noise, beside that between noises at "
            "equal caption; a model that ignores its captions has 0",
            unit="grey levels",
            better="higher",
        ),
        result(
            "noise_effect",
            mean_difference(list(flat.unbind(0))),
            label="change by the noise",
            num_images=flat.shape[0] * flat.shape[1],
            baseline_of="caption_effect",
            baseline="other_noise",
            unit="grey levels",
            better="higher",
        ),
    ]


def mean_difference(groups: Sequence[Tensor]) -> float:
    """Mean absolute difference between different rows of each (n, F) group; nan where groups have a single row."""
    n, width = groups[0].shape
    if n < 2:
        return math.nan
    total = math.fsum(float(torch.cdist(group, group, p=1).double().sum()) for group in groups)
    return total / (len(groups) * n * (n - 1) * width)


def cost_results(model: nn.Module, seconds_per_image: float, num_images: int, how: str) -> list[Result]:
    """Time of a picture, and the parameters of each component."""
    results = [
        result(
            "seconds_per_image",
            seconds_per_image,
            label="Drawing",
            unit="s/image",
            better="lower",
            num_images=num_images,
            note=how,
        )
    ]
    for name, part in model.named_children():
        size = float(sum(p.numel() for p in part.parameters()))
        label = f"Parameters, {PARTS.get(name, name)}"
        results.append(result(f"parameters_{name}", size, label=label, unit="", better=None, num_images=0))
    return results


PARTS = {"vae": "VAE", "text": "text projection", "flow": "flow"}
