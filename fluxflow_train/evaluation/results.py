"""From stored features to numbers: each distance with its interval, its noise floor and a degraded baseline.

R real and N fake images, F feature width, K = 64 components.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.evaluation.extractors import distance_name
from fluxflow_train.evaluation.reference import Real
from fluxflow_train.metrics import frechet_infinity as infinity
from fluxflow_train.metrics.extractor import Extractor
from fluxflow_train.metrics.features import paired_distance
from fluxflow_train.metrics.fid import frechet_value
from fluxflow_train.metrics.frechet import FrechetDistance, Projection, enough_images, fit_projection, moments
from fluxflow_train.metrics.kid import INTERVAL_METHOD, kid_interval, kid_of_sets
from fluxflow_train.metrics.manifold import density_coverage, precision_recall
from fluxflow_train.reports.distances import PROJECTION_DIMENSION, PROJECTION_IMAGES, kid_result
from fluxflow_train.reports.results import Result, mean_result, result

RIVALS = {"noise_floor": "real against real", "degraded": "real images at a quarter of their side"}
NEAREST_PRECISION, NEAREST_DENSITY = 3, 5
MEANS = {
    "psnr": ("PSNR", "dB", "higher"),
    "psnr_nonwhite": ("PSNR, non-white pixels", "dB", "higher"),
    "ssim": ("SSIM", "", "higher"),
    "lpips": ("LPIPS", "", "lower"),
    "rate_nats": ("Rate", "nats/image", None),
    "clip_score": ("CLIPScore", "", "higher"),
}


@dataclass
class Findings:
    """What was computed of one set of pictures; `by_size` is FID-infinity's fit, where there is one."""

    results: list[Result] = field(default_factory=list)
    estimator: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    by_size: dict[str, Any] | None = None
    cross_checks: list[tuple[float, float]] = field(default_factory=list)  # (value, deviation)

    def entry(self, name: str) -> Result | None:
        """The result of that name, where there is one with a value."""
        return next((entry for entry in self.results if entry["name"] == name and entry["raw"] is not None), None)

    def value(self, name: str) -> float | None:
        entry = self.entry(name)
        return None if entry is None else entry["raw"]


class Frechet(NamedTuple):
    """How Frechet distances are taken here: in all F dimensions, or on K components where the sets are small."""

    name: str
    label: str
    projection: Projection | None

    def __call__(self, real: Tensor, fake: Tensor) -> FrechetDistance:
        if self.projection is not None:
            real, fake = self.projection(real), self.projection(fake)
        return frechet_value(real, fake)

    def allows(self, num_images: int, width: int) -> bool:
        return enough_images(num_images, width if self.projection is None else self.projection.axes.shape[1])


class Yardsticks(NamedTuple):
    """Pairs of sets (., F) that every distance is also taken between, by the names of `RIVALS`."""

    noise_floor: tuple[Tensor, Tensor]
    degraded: tuple[Tensor, Tensor]

    @property
    def floor_note(self) -> str:
        return f"two disjoint sets of {len(self.noise_floor[0])} real images: what chance alone makes"


def yardsticks(real: Tensor, degraded: Tensor, num_fake: int) -> Yardsticks:
    """The noise floor at the size of the fakes where the real images are twice as many, else from halves."""
    size = min(num_fake, len(real) // 2)
    return Yardsticks((real[:size], real[size : 2 * size]), (real, degraded))


def choose_frechet(extractor: Extractor, num_images: int, fit: Tensor) -> tuple[Frechet | None, Findings]:
    """By the rule for small sets, with its warnings; PCA is fitted on the first 512 of `fit` (., F).

    Source: EVALUATION.md 2: below 5 images per dimension a Frechet distance is mostly bias.
    """
    width, name = extractor.num_features, extractor.name
    if enough_images(num_images, width):
        label = "FID" if extractor.is_canonical else f"Frechet distance, {name}"
        return Frechet(distance_name(extractor), label, None), Findings()
    need = f"{num_images} images are fewer than 5 for each of {width} dimensions: no {distance_name(extractor)}"
    dimension = min(PROJECTION_DIMENSION, width)
    fit = fit[:PROJECTION_IMAGES]
    if not enough_images(min(num_images, len(fit)), dimension):
        doubt = f"{need}, and none on {dimension} components either (5 x {dimension} are needed); use KID"
        return None, Findings(warnings=[doubt])
    label = f"Frechet distance, {dimension} components"
    frechet = Frechet(f"frechet_pca{dimension}_{name}", label, fit_projection(fit, dimension))
    doubt = f"{need}, but on {dimension} components of {len(fit)} real images; no value for infinite N"
    return frechet, Findings(warnings=[doubt])


def rival_words(name: str, rival: str, marks: Yardsticks) -> dict[str, Any]:
    note = marks.floor_note if rival == "noise_floor" else ""
    return {"label": RIVALS[rival], "baseline_of": name, "baseline": rival, "note": note}


def sized(entry: Result, num_real: int, num_fake: int) -> Result:
    return entry | {"n_real": num_real, "n_fake": num_fake}


# ---- distances ----


def frechet_findings(frechet: Frechet, real: Tensor, fake: Tensor, marks: Yardsticks) -> Findings:
    """The distance and the yardsticks'; the value for infinite N where all dimensions are used."""
    found = Findings()
    for rival, (a, b) in {"": (real, fake), **marks._asdict()}.items():
        size = min(len(a), len(b))
        if not frechet.allows(size, a.shape[1]):
            continue
        distance = frechet(a, b)
        found.cross_checks.append((distance.value, distance.cross_check))
        more = rival_words(frechet.name, rival, marks) if rival else dict[str, Any](label=frechet.label)
        name = f"{frechet.name}_{rival}" if rival else frechet.name
        found.results.append(
            sized(result(name, distance.value, unit="", better="lower", num_images=size, **more), len(a), len(b))
        )
    found.estimator["frechet"] = {
        "implementation": "torchmetrics FrechetInceptionDistance in float64, of stored float32 features",
        "dimension": real.shape[1] if frechet.projection is None else frechet.projection.axes.shape[1],
        "trace_cross_check": max(deviation for _, deviation in found.cross_checks),
    }
    return found


def infinity_findings(frechet: Frechet, real: Tensor, fake: Tensor, seed: int) -> Findings:
    """What the distance would be of endlessly many pictures; only in all dimensions, with 5 images for each."""
    fitted = infinity.frechet_infinity(
        moments(real, real.double().mean(0)), fake, rng.generator(seed, "frechet-infinity")
    )
    entry = result(
        f"{frechet.name}_infinity",
        fitted.value,
        label=f"{frechet.label}, for infinite N",
        unit="",
        better="lower",
        num_images=len(fake),
        interval=fitted.interval,
        interval_method=infinity.METHOD,
        note="extrapolated over subset sizes; no result of this N",
    )
    by_size = {
        "sizes": fitted.sizes,
        "values": fitted.values,
        "intercept": fitted.value,
        "slope": fitted.slope,
        "intercept_se": fitted.intercept_se,
    }
    return Findings([sized(entry, len(real), len(fake))], by_size=by_size)


def kid_findings(extractor: Extractor, real: Tensor, fake: Tensor, marks: Yardsticks, seed: int) -> Findings:
    """Of independent sets, all images of both."""
    name = f"kid_{extractor.name}"
    found = Findings(estimator={"kid": "unbiased U-statistic of both whole sets, cubic kernel"})
    for rival, (a, b) in {"": (real, fake), **marks._asdict()}.items():
        if min(len(a), len(b)) < 2:
            continue
        enough = min(len(a), len(b)) >= 4
        more = rival_words(name, rival, marks) if rival else dict[str, Any](label="Kernel distance (KID)")
        entry = result(
            f"{name}_{rival}" if rival else name,
            kid_of_sets(a, b),
            unit="",
            better="lower",
            num_images=len(b),
            interval=kid_interval(a, b, rng.generator(seed, f"kid-{rival}")) if enough else None,
            interval_method=INTERVAL_METHOD,
            **more,
        )
        found.results.append(sized(entry, len(a), len(b)))
    return found


def paired_findings(extractor: Extractor, real: Tensor, fake: Tensor, marks: Yardsticks, seed: int) -> Findings:
    """Of images (N, F) and their own reconstructions: distances of pairs, and KID without the pairs' own terms."""
    found = Findings(estimator={"paired": "Euclidean", "kid": "unbiased paired U-statistic, cubic kernel"})
    name = f"paired_distance_{extractor.name}"
    words: dict[str, Any] = {"unit": "", "better": "lower"}
    others = {
        "": ("Feature distance, image to its copy", fake),
        "degraded": (RIVALS["degraded"], marks.degraded[1]),
        "another_image": ("another image of the split", real.roll(1, 0)),
    }
    for rival, (label, other) in others.items():
        baseline = {"baseline_of": name, "baseline": rival} if rival else {}
        values = paired_distance(real, other).tolist()
        found.results.append(
            mean_result(f"{name}_{rival}" if rival else name, values, label=label, **words, **baseline)
        )
    name = f"kid_{extractor.name}"
    for rival, (a, b) in {"": (real, fake), **marks._asdict()}.items():
        if min(len(a), len(b)) >= 2:
            more = rival_words(name, rival, marks) if rival else dict[str, Any](label="Kernel distance (KID)")
            found.results.append(kid_result(f"{name}_{rival}" if rival else name, a, b, seed, **more))
    return found


def manifold_findings(real: Tensor, fake: Tensor, marks: Yardsticks) -> Findings:
    """Precision, recall, density and coverage, and what two sets of real images reach."""
    found = Findings()
    labels = {"precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"}
    for rival, (a, b) in {"": (real, fake), **marks._asdict()}.items():
        if min(len(a), len(b)) <= NEAREST_DENSITY:
            continue
        values = (*precision_recall(a, b, NEAREST_PRECISION), *density_coverage(a, b, NEAREST_DENSITY))
        for (name, label), value in zip(labels.items(), values, strict=True):
            more = rival_words(name, rival, marks) if rival else dict[str, Any](label=label)
            entry = result(
                f"{name}_{rival}" if rival else name, value, unit="", better="higher", num_images=len(b), **more
            )
            found.results.append(sized(entry, len(a), len(b)))
    found.estimator["manifold"] = f"k = {NEAREST_PRECISION} (precision, recall), {NEAREST_DENSITY} (density, coverage)"
    return found


# ---- of one run ----


def merged(parts: list[Findings]) -> Findings:
    whole = Findings()
    for part in parts:
        whole.results += part.results
        whole.estimator |= part.estimator
        whole.warnings += part.warnings
        whole.cross_checks += part.cross_checks
        whole.by_size = part.by_size or whole.by_size
    return whole


def distances(extractor: Extractor, real: Real, fake: Tensor, seed: int) -> Findings:
    """Between the real images and independent fakes (N, F): Frechet, KID, precision to coverage."""
    x = real.reference.features
    marks = yardsticks(x, real.degraded, len(fake))
    frechet, doubts = choose_frechet(extractor, min(len(x), len(fake)), real.train.features)
    parts = [doubts]
    if frechet is not None:
        parts.append(frechet_findings(frechet, x, fake, marks))
        if frechet.projection is None:
            parts.append(infinity_findings(frechet, x, fake, seed))
    return merged([*parts, kid_findings(extractor, x, fake, marks, seed), manifold_findings(x, fake, marks)])


def paired_distances(extractor: Extractor, real: Real, fake: Tensor, seed: int) -> Findings:
    """Between real images and their own reconstructions (N, F)."""
    x = real.reference.features
    marks = yardsticks(x, real.degraded, len(fake))
    frechet, doubts = choose_frechet(extractor, len(x), real.train.features)
    parts = [doubts] if frechet is None else [doubts, frechet_findings(frechet, x, fake, marks)]
    return merged([*parts, paired_findings(extractor, x, fake, marks, seed)])


def means(rows: dict[str, Tensor]) -> list[Result]:
    """Means over images of whatever was measured of each alone."""
    found = []
    for name, (label, unit, better) in MEANS.items():
        if name in rows:
            note = "PSNR compares only at equal rate" if name == "rate_nats" else ""
            found.append(mean_result(name, rows[name].tolist(), label=label, unit=unit, better=better, note=note))
    speed = float(rows["seconds"].double().mean())
    found.append(
        result(
            "seconds_per_image",
            speed,
            label="Making a picture",
            unit="s/image",
            better="lower",
            num_images=len(rows["seconds"]),
            note="fp32, the model alone",
        )
    )
    return found
