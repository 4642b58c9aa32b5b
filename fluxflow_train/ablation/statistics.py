"""What a comparison of arms over training seeds says: differences, equivalence, families of tests, factorials.

S seeds. The seed is the unit of replication and both arms ran on the same ones, so everything is a t interval of one
number per seed. Quality is higher-is-better: a caller negates FID or KID. Intervals are exact for normal numbers; heavy
tails widen them, skewness makes them err. Arms whose noise is alike have symmetric differences, whatever its shape.
A run that failed has no quality: its seed is left out of both arms by the caller, and said so in the report.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from fluxflow_train.ablation.power import POWER, minimum_detectable_effect

Array = NDArray[np.float64]

ROUNDING = 16 * float(np.finfo(np.float64).eps)  # a spread below this part of the largest number is no spread


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float


class Contrast(NamedTuple):
    """The mean of one number per seed with its t interval, its sd over seeds and the two-sided p value of mean 0."""

    estimate: float
    low: float
    high: float
    sd: float
    p_value: float
    values: Array


class PairedDifference(NamedTuple):
    """`difference` = mean of a - b over `num_pairs` seeds, with `sd` that of a - b.

    `minimum_detectable_effect` is the difference that this number of seeds finds with `power`, taking `sd` for true.
    """

    difference: float
    low: float
    high: float
    sd: float
    correlation: float
    p_value: float
    num_pairs: int
    minimum_detectable_effect: float
    confidence: float
    power: float


class Equivalence(NamedTuple):
    """`low` to `high` is the 1 - 2 alpha interval of a - b; `equivalent` where it lies inside -margin to margin."""

    equivalent: bool
    p_value: float
    difference: float
    low: float
    high: float
    margin: float
    alpha: float
    num_pairs: int


class Factorial(NamedTuple):
    """Contrasts of a 2 x 2 design, and the mean of each cell over seeds (2, 2)."""

    vae: Contrast
    flow: Contrast
    interaction: Contrast
    means: Array


def finite(name: str, values: ArrayLike) -> Array:
    """`values` as float64.

    Raises:
        ValueError: one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: leave a failed seed out of every arm, got {array.tolist()}")
    return array


def paired(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both as float64 (S,).

    Raises:
        ValueError: not one number a seed, unequal numbers of seeds, no seed, or a value that is not finite.
    """
    first, second = finite("a", a), finite("b", b)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"pairs need two equal shapes (S,) with S >= 1, got {first.shape} and {second.shape}")
    return first, second


def t_quantile(num: int, confidence: float) -> float:
    """Half width, in standard errors, of the two-sided interval of a mean of `num` values; infinite for one value.

    Source: Student 1908, "The probable error of a mean".

    Raises:
        ValueError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return float(special.stdtrit(num - 1, (1 + confidence) / 2)) if num > 1 else math.inf


def spread(values: Array, largest: float) -> float:
    """Standard deviation over seeds; nan for one seed, 0 below the rounding of the numbers that it came from.

    Args:
        values: (S,).
        largest: the largest magnitude among the numbers that `values` were computed from.
    """
    if values.size < 2:
        return math.nan
    sd = float(values.std(ddof=1))
    return sd if sd > ROUNDING * largest else 0.0


def mean_interval(x: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of one number per seed (S,) with Student's t interval.

    One seed, or seeds that all gave the same number, show no spread to make an interval from: it is infinite then.
    Source: Student 1908, "The probable error of a mean".

    Raises:
        ValueError: not a shape (S,) of finite numbers with S >= 1, or `confidence` not between 0 and 1.
    """
    values, _ = paired(x, x)
    mean, sd, t = float(values.mean()), spread(values, float(abs(values).max())), t_quantile(values.size, confidence)
    half = t * sd / math.sqrt(values.size) if sd > 0 else math.inf
    return Interval(mean, mean - half, mean + half)


def contrast(values: Array, largest: float, confidence: float) -> Contrast:
    """The t interval and test of a contrast between arms, one value a seed (S,); `largest` as for `spread`.

    Where all values are 0 to rounding the arms are the same computation: the interval is 0 to 0 and p is 1.
    Where they are all the same other number, the seeds did not act or the metric was rounded. The formula would give a
    certainty from no estimate of error, so the interval is infinite and p is nan, as for a single seed.
    """
    num, mean, sd = values.size, float(values.mean()), spread(values, largest)
    t = t_quantile(num, confidence)
    if sd > 0:
        error = sd / math.sqrt(num)
        p_value = 2 * float(special.stdtr(num - 1, -abs(mean) / error))
        return Contrast(mean, mean - t * error, mean + t * error, sd, p_value, values)
    if num > 1 and float(abs(values).max()) <= ROUNDING * largest:
        return Contrast(0.0, 0.0, 0.0, 0.0, 1.0, values)
    return Contrast(mean, -math.inf, math.inf, sd, math.nan, values)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> PairedDifference:
    """Mean of a - b over the same seeds, (S,) each, by the paired t test, in units of quality.

    One pair gives an infinite interval and p = nan; differences without spread are treated as `contrast` says, and
    their minimum detectable effect is nan. The pair correlation is nan where an arm has no spread, and for two seeds,
    where it is +-1 whatever happened.
    Source: Student 1908, "The probable error of a mean", illustration I (pairs).

    Raises:
        ValueError: see `paired`, or `confidence` is not between 0 and 1.
    """
    first, second = paired(a, b)
    num, magnitudes = first.size, (float(abs(first).max()), float(abs(second).max()))
    found = contrast(first - second, max(magnitudes), confidence)
    spreads = [spread(x, largest) for x, largest in zip((first, second), magnitudes, strict=True)]
    correlated = num > 2 and min(spreads) > 0
    correlation = float(np.corrcoef(first, second)[0, 1]) if correlated else math.nan
    detectable = math.nan
    if num < 2 or found.sd > 0:
        detectable = minimum_detectable_effect(found.sd, num, 1 - confidence, POWER)
    return PairedDifference(
        found.estimate,
        found.low,
        found.high,
        found.sd,
        correlation,
        found.p_value,
        num,
        detectable,
        confidence,
        POWER,
    )


def holm(p_values: ArrayLike) -> Array:
    """Adjusted p values of a family (M,), in the order given; nan stays nan and does not count as a comparison.

    Rejecting where an adjusted value is at most alpha errs once or more in the family with probability alpha at most,
    whatever the dependence. Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Raises:
        ValueError: not a shape (M,), or a value outside 0 to 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(f"p values must be of shape (M,) and from 0 to 1, got {p.tolist()}")
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: int(np.isfinite(p).sum())]  # nan sorts last
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def equivalence(a: ArrayLike, b: ArrayLike, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided paired t tests of |mean of a - b| >= margin, (S,) each; the margin is fixed before the study.

    It calls arms that differ by the margin or more equivalent with probability `alpha` at most. One pair, or equal
    differences other than 0, never give equivalence; arms that agree to the last bit do, with p = 0.
    Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach".

    Raises:
        ValueError: see `paired`; margin not positive; alpha not between 0 and 0.5.
    """
    if not (0 < margin < math.inf and 0 < alpha < 0.5):
        raise ValueError(f"needs a finite margin > 0 and alpha between 0 and 0.5, got {margin} and {alpha}")
    first, second = paired(a, b)
    found = contrast(first - second, float(max(abs(first).max(), abs(second).max())), 1 - 2 * alpha)
    p_value = math.nan
    if found.sd > 0:
        error = found.sd / math.sqrt(first.size)
        p_value = float(special.stdtr(first.size - 1, (abs(found.estimate) - margin) / error))  # the larger of the two
    elif found.p_value == 1:
        p_value = 0.0
    return Equivalence(p_value < alpha, p_value, found.estimate, found.low, found.high, margin, alpha, first.size)


def factorial(cells: ArrayLike, confidence: float = 0.95) -> Factorial:
    """Main effects and interaction of two factors with two arms each, from one value of every contrast a seed.

    With y[i, j] the quality of VAE arm i with flow arm j at one seed, always the first arm minus the second:
    vae = (y[0, 0] + y[0, 1] - y[1, 0] - y[1, 1]) / 2, averaged over the flows;
    flow = (y[0, 0] + y[1, 0] - y[0, 1] - y[1, 1]) / 2, averaged over the VAEs;
    interaction = (y[0, 0] - y[0, 1]) - (y[1, 0] - y[1, 1]): what the flow's arm gains with the first VAE, less what it
    gains with the second (not halved).
    Source: Yates 1937, "The design and analysis of factorial experiments"; the t interval is Student's.

    Args:
        cells: (2, 2, S): VAE arm, flow arm, seed.

    Raises:
        ValueError: another shape, no seed, a value that is not finite, or `confidence` not between 0 and 1.
    """
    y = finite("cells", cells)
    if y.ndim != 3 or y.shape[:2] != (2, 2) or not y.shape[2]:
        raise ValueError(f"cells must be of shape (2, 2, S) with S >= 1, got {y.shape}")
    largest = float(abs(y).max())
    return Factorial(
        contrast((y[0] - y[1]).mean(0), largest, confidence),
        contrast((y[:, 0] - y[:, 1]).mean(0), largest, confidence),
        contrast((y[0, 0] - y[0, 1]) - (y[1, 0] - y[1, 1]), largest, confidence),
        y.mean(2),
    )
