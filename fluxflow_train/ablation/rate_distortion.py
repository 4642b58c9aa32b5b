"""Quality at equal rate, for autoencoder arms whose latents carry different numbers of nats.

S seeds, K points of a curve (sizes, or weights of the KL term). Rate: KL in nats per image.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from fluxflow_train.ablation.statistics import Array, contrast, finite


class RateDistortion(NamedTuple):
    """Mean over seeds of a - b at equal rate, in units of quality; `differences` (S,) is nan where nothing overlaps.

    `overlap` (S,): the compared part of all log rates that a seed's two curves span, 0 to 1. `explanation` is empty
    where every seed was compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float
    num_seeds: int
    explanation: str
    differences: Array
    overlap: Array


def rates_agree(rate_a: ArrayLike, rate_b: ArrayLike, tolerance: float = 0.05) -> bool:
    """Whether quality may be compared directly: rates (S,) or (S, K), geometric means over seeds, in every column.

    Agreement is a ratio of at most 1 + tolerance either way, so the order of the arms doesn't matter. The mean over
    seeds is judged, since that is what biases a mean difference: more seeds don't make agreement harder.

    Raises:
        ValueError: mismatched shapes, no rate, or a rate not positive and finite.
    """
    a, b = rates("rate_a", rate_a), rates("rate_b", rate_b)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"rates need equal shapes, got {a.shape} and {b.shape}")
    return bool((abs(np.atleast_1d(np.log(a / b)).mean(0)) <= math.log1p(tolerance)).all())


def rate_distortion(
    quality_a: ArrayLike, rate_a: ArrayLike, quality_b: ArrayLike, rate_b: ArrayLike, confidence: float = 0.95
) -> RateDistortion:
    """Average vertical distance of two curves of quality against log rate, per seed, and its t interval over seeds.

    Each seed's curves run through its own points by monotone cubics (PCHIP; a line for two points), which unlike the
    cubic of the source can't overshoot between points, and are integrated exactly over the rates that both have. A seed
    without common rates is left out and `explanation` says so; with none left the result is nan. Where the arms' sizes
    differ along the curve, so does what the curve compares: the caller chooses the points.
    Source: Bjontegaard 2001, "Calculation of average PSNR differences between RD-curves", VCEG-M33; Fritsch & Carlson
    1980, "Monotone piecewise cubic interpolation".

    Args:
        quality_a, quality_b: (S, K), higher is better. Arms may have different numbers of points.
        rate_a, rate_b: of the same shapes, nats per image.

    Raises:
        ValueError: mismatched shapes, a rate not positive or repeated in a curve, a value that is not finite, or
            `confidence` not between 0 and 1.
    """
    a, b = curves("a", quality_a, rate_a), curves("b", quality_b, rate_b)
    if len(a) != len(b):
        raise ValueError(f"both arms need the same seeds, got {len(a)} and {len(b)}")
    compared = np.array([distance(x, y) for x, y in zip(a, b, strict=True)])
    differences, overlap = compared[:, 0], compared[:, 1]
    usable = differences[overlap > 0]
    explanation = ""
    if usable.size < len(a):
        explanation = f"{len(a) - usable.size} of {len(a)} seeds have no rate that both arms reach"
    if not usable.size:
        nothing = math.nan, math.nan, math.nan, math.nan
        return RateDistortion(*nothing, confidence, 0, explanation, differences, overlap)
    largest = float(max(abs(curve[1]).max() for curve in (*a, *b)))
    found = contrast(usable, largest, confidence)
    estimates = found.estimate, found.low, found.high, found.p_value
    return RateDistortion(*estimates, confidence, usable.size, explanation, differences, overlap)


def distance(a: Array, b: Array) -> tuple[float, float]:
    """Average of a - b over the overlap of two curves (2, K) of log rate and quality, and the overlap's share.

    nan and 0 where they have no interval in common.
    """
    low, high = max(a[0, 0], b[0, 0]), min(a[0, -1], b[0, -1])
    if not high > low:
        return math.nan, 0.0
    areas = [float(PchipInterpolator(*curve).integrate(low, high)) for curve in (a, b)]
    span = max(a[0, -1], b[0, -1]) - min(a[0, 0], b[0, 0])
    return (areas[0] - areas[1]) / float(high - low), float((high - low) / span)


def rates(name: str, values: ArrayLike) -> Array:
    """`values` as float64; ValueError where one is not positive and finite."""
    array = finite(name, values)
    if (array <= 0).any():
        raise ValueError(f"{name} must be positive, got {array.tolist()}")
    return array


def curves(arm: str, quality: ArrayLike, rate: ArrayLike) -> list[Array]:
    """(S, K) twice to S curves (2, K): log rate in rising order, and quality."""
    y, x = finite(f"quality_{arm}", quality), rates(f"rate_{arm}", rate)
    if y.ndim != 2 or y.shape != x.shape or not y.size:
        raise ValueError(f"arm {arm} needs quality and rate of one shape (S, K), got {y.shape} and {x.shape}")
    found = [np.stack([np.log(row), values])[:, np.argsort(row)] for row, values in zip(x, y, strict=True)]
    if any((np.diff(curve[0]) == 0).any() for curve in found):
        raise ValueError(f"arm {arm} has one rate twice in a curve: {x.tolist()}")
    return found
