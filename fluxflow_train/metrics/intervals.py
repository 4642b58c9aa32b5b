"""95 % intervals over the images of a split. They say nothing about training seeds."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fluxflow_train import rng

NORMAL_METHOD = "mean +- 1.96 standard errors over images"
HALVES_METHOD = "2.5 to 97.5 % of {num} random halves without replacement, whose spread is that of the whole"


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Normal interval of the mean of the finite values; None for fewer than two."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return None
    centre, half = math.fsum(finite) / len(finite), 1.96 * float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    return centre - half, centre + half


def halves_interval(
    estimate: Callable[[np.ndarray], float], num_images: int, seed: int, num_halves: int = 200
) -> tuple[float, float]:
    """Interval of an estimator that takes the indices of a subset, from random halves without replacement.

    Half samples vary about the whole sample's estimate as that varies about the truth, so no rescaling is needed;
    a bootstrap with replacement would repeat images and bias every distance between sets.
    Source: Politis, Romano & Wolf 1999, "Subsampling", with the finite-population factor sqrt(1 - 1/2).
    """
    size = num_images // 2
    values = [estimate(rng.generator(seed, "halves", i).permutation(num_images)[:size]) for i in range(num_halves)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
