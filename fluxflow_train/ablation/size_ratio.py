"""How many times more parameters one arm needs to equal the other, with an interval over training seeds.

S seeds, K sizes, P parameters. Model: quality = intercept of the arm + slope log P, one slope for both arms.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fluxflow_train.ablation.statistics import Array, Contrast, contrast, finite, paired, t_quantile

ONE_SEED = "not bounded: one seed shows no spread"
NO_SPREAD = "not bounded: the seeds gave the same numbers, which shows no spread"
FLAT = "not bounded: the slope of quality against size is not distinguishable from zero"
FALLING = "not bounded: quality falls with size, so a size ratio has no meaning"


class RatioSet(NamedTuple):
    """Confidence set of a ratio of two means.

    `bounded`: from `low` to `high`. Otherwise `low`, `high` are -inf, inf and the set is every number but those between
    the two of `excluded`; where that is None, every number.
    """

    estimate: float
    low: float
    high: float
    bounded: bool
    excluded: tuple[float, float] | None


class SizeRatio(NamedTuple):
    """`ratio` R: arm b needs R times the parameters of arm a for the same quality; R > 1 favours a.

    Where not `bounded`, `low` and `high` are 0 and infinity (`log_low`, `log_high` infinite) and `explanation`, else
    empty, says why in words; `excluded` are log ratios ruled out all the same, as in `RatioSet`. `difference` is the
    mean over sizes of a - b and `slope` is quality per unit of natural log P, each with its value per seed; the fitted
    lines are intercept + slope.estimate log P. `slope_difference` (a less b) and `curvature` (the quadratic term in
    log P, None for two sizes) test the model: where one of them excludes 0, the ratio depends on the size and R is its
    summary over the sizes at hand.
    """

    ratio: float
    low: float
    high: float
    log_ratio: float
    log_low: float
    log_high: float
    confidence: float
    bounded: bool
    explanation: str
    excluded: tuple[float, float] | None
    difference: Contrast
    slope: Contrast
    slope_difference: Contrast
    curvature: Contrast | None
    intercept_a: float
    intercept_b: float


def fieller(numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95) -> RatioSet:
    """Exact confidence set of mean(numerator) / mean(denominator), (S,) each, from pairs that are iid binormal.

    It holds the rho at which Student's t test of the mean of numerator - rho denominator does not reject: with
    e_xy = t^2 cov(x, y) / S, all rho where (d^2 - e_dd) - 2 rho (d b - e_db) + rho^2 (b^2 - e_bb) <= 0.
    That is an interval if the denominator is distinguishable from 0; otherwise all numbers, or all but an interval.
    One seed gives all numbers. Source: Fieller 1954, "Some problems in interval estimation".

    Raises:
        ValueError: see `statistics.paired`, or `confidence` is not between 0 and 1.
    """
    d, b = paired(numerator, denominator)
    num, t = d.size, t_quantile(d.size, confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = float(np.divide(d.mean(), b.mean()))
    everything = RatioSet(estimate, -math.inf, math.inf, False, None)
    if num < 2:
        return everything
    error = np.cov(d, b) * t**2 / num
    constant, square = d.mean() ** 2 - error[0, 0], b.mean() ** 2 - error[1, 1]
    linear = d.mean() * b.mean() - error[0, 1]
    discriminant = linear**2 - constant * square
    if square > 0:
        half = math.sqrt(max(discriminant, 0.0))
        return RatioSet(estimate, float((linear - half) / square), float((linear + half) / square), True, None)
    if square == 0 or discriminant <= 0:
        return everything
    ends = sorted(float((linear + sign * math.sqrt(discriminant)) / square) for sign in (-1, 1))
    return everything._replace(excluded=(ends[0], ends[1]))


def size_ratio(
    quality_a: ArrayLike, quality_b: ArrayLike, parameters: ArrayLike, confidence: float = 0.95
) -> SizeRatio:
    """R = exp((intercept_a - intercept_b) / slope) of the module's model, with its interval over seeds.

    Per seed, d is the mean over sizes of a - b and the slope is that of least squares with an intercept for each arm;
    log R = mean d / mean slope, by Fieller's set. Nothing is assumed about the noise of the sizes within a seed. The
    ratio is nan where the estimated slope is not positive. Two seeds are seldom enough for a bounded interval, and
    seeds without spread never are: see `statistics.contrast`.
    Source: Fieller 1954, "Some problems in interval estimation"; as a parallel-line assay with the log ratio of doses
    (here sizes) at equal response, Finney 1978, "Statistical method in biological assay", chapter 4.

    Args:
        quality_a, quality_b: (S, K), higher is better, the same seeds and sizes.
        parameters: (K,) the nominal size of each column, the same for both arms.

    Raises:
        ValueError: fewer than 2 different sizes, mismatched shapes, a size that is not positive, a value that is not
            finite, or `confidence` not between 0 and 1.
    """
    a, b, log_size = checked(quality_a, quality_b, parameters)
    largest, x = float(max(abs(a).max(), abs(b).max())), log_size - log_size.mean()
    seeds = partial(over_seeds, largest=largest, confidence=confidence)
    difference, slope = seeds(a - b, np.full(x.size, 1 / x.size)), seeds((a + b) / 2, x / (x @ x))
    found = fieller(difference.values, slope.values, confidence)
    explanation = explain(found, difference, slope)
    if explanation:
        excluded = None if explanation == NO_SPREAD else found.excluded
        found = RatioSet(found.estimate, -math.inf, math.inf, False, excluded)
    if not slope.estimate > 0:
        found = found._replace(estimate=math.nan)
    with np.errstate(over="ignore"):
        ratio, low, high = (float(np.exp(value)) for value in found[:3])
    return SizeRatio(
        ratio=ratio,
        low=low,
        high=high,
        log_ratio=found.estimate,
        log_low=found.low,
        log_high=found.high,
        confidence=confidence,
        bounded=found.bounded,
        explanation=explanation,
        excluded=found.excluded,
        difference=difference,
        slope=slope,
        slope_difference=seeds(a - b, x / (x @ x)),
        curvature=seeds((a + b) / 2, parabola(x)) if len(set(x)) > 2 else None,
        intercept_a=float(a.mean() - slope.estimate * log_size.mean()),
        intercept_b=float(b.mean() - slope.estimate * log_size.mean()),
    )


def checked(quality_a: ArrayLike, quality_b: ArrayLike, parameters: ArrayLike) -> tuple[Array, Array, Array]:
    """Quality (S, K) of both arms and log P (K,), or the errors of `size_ratio`."""
    a, b, sizes = finite("quality_a", quality_a), finite("quality_b", quality_b), finite("parameters", parameters)
    if a.ndim != 2 or a.shape != b.shape or sizes.shape != a.shape[1:] or not a.size:
        raise ValueError(f"needs (S, K), (S, K) and (K,) with S >= 1, got {a.shape}, {b.shape} and {sizes.shape}")
    if len(set(sizes.tolist())) < 2 or (sizes <= 0).any():
        raise ValueError(f"a slope needs 2 different sizes and positive ones, got {sizes.tolist()}")
    return a, b, np.log(sizes)


def over_seeds(quality: Array, weights: Array, largest: float, confidence: float) -> Contrast:
    """The contrast quality @ weights of each seed: (S, K) and (K,); `largest` magnitude among the qualities."""
    return contrast(quality @ weights, largest * float(abs(weights).sum()), confidence)


def parabola(x: Array) -> Array:
    """Weights (K,) that give the coefficient of x^2 of the least-squares parabola through (x, quality): both (K,)."""
    return np.linalg.pinv(np.stack([np.ones_like(x), x, x**2], axis=1))[2]


def explain(found: RatioSet, difference: Contrast, slope: Contrast) -> str:
    """Why a size ratio has no bounded interval; empty where it has one."""
    if slope.values.size < 2:
        return ONE_SEED
    if math.isnan(difference.p_value) or math.isnan(slope.p_value):
        return NO_SPREAD
    if slope.high < 0:
        return FALLING
    return "" if found.bounded else FLAT
