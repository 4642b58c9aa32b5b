"""Frechet distance for endlessly many generated images, from its growth over subsets of those at hand.

N generated images, F feature width, K subset sizes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluxflow_train.metrics.frechet import (
    IMAGES_PER_DIMENSION,
    PIECE,
    Moments,
    moments,
    require_enough_images,
    sqrt_psd,
)

NUM_SIZES = 15
METHOD = "intercept +- 1.96 standard errors by the infinitesimal jackknife over generated images"


class FrechetInfinity(NamedTuple):
    """`value` is where the line `value + slope / N` through (`sizes`, `values`) meets 1/N = 0."""

    value: float
    interval: tuple[float, float]
    sizes: list[int]
    values: list[float]
    intercept_se: float
    slope: float


def subset_sizes(num_images: int, dimension: int) -> list[int]:
    """15 sizes from max(5 F, N / 10) to N, evenly in 1/N."""
    least = max(IMAGES_PER_DIMENSION * dimension, num_images // 10)
    return [round(1 / x) for x in np.linspace(1 / least, 1 / num_images, NUM_SIZES)]


def line_weights(sizes: list[int]) -> np.ndarray:
    """(2, K): what each value counts in intercept and slope of the line over 1/n, weighted by n (variance ~ 1/n)."""
    design = np.stack([np.ones(len(sizes)), 1 / np.array(sizes)], axis=1)
    weighted = design * np.array(sizes)[:, None]
    return np.linalg.solve(design.T @ weighted, weighted.T)


class Target(NamedTuple):
    """The reference's Gaussian: `mean` (F,), `root` (F, F) of its covariance, `trace` of the covariance."""

    mean: Tensor
    root: Tensor
    trace: Tensor


def distance_and_influence(target: Target, fake: Tensor, shift: Tensor) -> tuple[float, Tensor]:
    """Frechet distance of features (n, F) to the target, and what each image adds to it, (n,) of mean 0.

    The derivative towards one image x is (T(x) - x)^2 less its mean over images, T the optimal transport to the target.
    """
    own = moments(fake, shift)
    mean, cov = own.mean, own.covariance
    values, vectors = torch.linalg.eigh(target.root @ cov @ target.root)
    roots = values.clamp(min=0).sqrt()
    distance = (mean - target.mean).square().sum() + target.trace + cov.trace() - 2 * roots.sum()
    inverse = torch.where(roots > roots.max() * 1e-7, 1 / roots, 0)
    half = target.root @ vectors
    transport = half * inverse @ half.T
    quadratic = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - transport
    pieces = []
    for piece in fake.split(PIECE):
        x = piece.double() - mean
        pieces.append(((x @ quadratic) * x).sum(1) + 2 * x @ (mean - target.mean))
    influence = torch.cat(pieces)
    return float(distance), influence - influence.mean()


def frechet_infinity(real: Moments, fake: Tensor, generator: np.random.Generator) -> FrechetInfinity:
    n, width = fake.shape
    require_enough_images(n, width)
    cov = real.covariance
    target = Target(real.mean, sqrt_psd(cov), cov.trace())
    sizes = subset_sizes(n, width)
    weights = line_weights(sizes)
    share = torch.zeros(n, dtype=torch.float64)
    values = []
    for size, weight in zip(sizes, weights[0], strict=True):
        chosen = torch.from_numpy(generator.permutation(n)[:size])
        value, influence = distance_and_influence(target, fake[chosen], real.mean)
        values.append(value)
        share[chosen] += weight / size * influence
    value, slope = weights @ np.array(values)
    error = float(share.norm())
    return FrechetInfinity(
        float(value), (float(value - 1.96 * error), float(value + 1.96 * error)), sizes, values, error, float(slope)
    )
