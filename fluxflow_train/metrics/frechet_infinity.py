"""Frechet distance for endlessly many generated images, from its growth over random subsets of those at hand.

N generated images, n images of a subset, F feature width, K = 15 subset sizes.
Source: Chong & Forsyth 2020, "Effectively unbiased FID and Inception Score and where to find them".
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
METHOD = (
    "hull of the linear and the quadratic fit's intercepts, each +- 1.96 standard errors "
    "(infinitesimal jackknife over generated images)"
)
# Square roots of eigenvalues below this part of the largest are rounding: no transport along their axes.
SMALLEST_ROOT = 1e-7


class FrechetInfinity(NamedTuple):
    """`value` is where the line `value + slope / n` through (`sizes`, `values`) meets 1/n = 0; `interval` 95 %.

    `intercept_se` is the line's alone. The reference counts as exact: intervals are about generated images.
    """

    value: float
    interval: tuple[float, float]
    sizes: list[int]
    values: list[float]
    intercept_se: float
    slope: float


class Target(NamedTuple):
    """The reference's Gaussian: `mean` (F,), `root` (F, F) of its covariance, `trace` of the covariance."""

    mean: Tensor
    root: Tensor
    trace: Tensor


def subset_sizes(num_images: int, dimension: int) -> list[int]:
    """15 sizes from max(5 F, N / 10) to N, evenly in 1/n; from N / 2 where 5 F is above it: a line needs a lever."""
    least = max(num_images // 10, min(IMAGES_PER_DIMENSION * dimension, num_images // 2))
    return [round(1 / x) for x in np.linspace(1 / least, 1 / num_images, NUM_SIZES)]


def fit_weights(sizes: list[int], degree: int) -> np.ndarray:
    """(degree + 1, K): how much each value counts in the coefficients of a polynomial in N/n, constant first.

    Weighted least squares; a distance's variance goes as 1/n, so its weight is n.
    """
    n = np.array(sizes, dtype=np.float64)
    design = np.vander(n.max() / n, degree + 1, increasing=True)
    weighted = design * n[:, None]
    return np.linalg.solve(design.T @ weighted, weighted.T)


def distance_and_influence(target: Target, fake: Tensor, shift: Tensor) -> tuple[float, Tensor]:
    """Frechet distance of features (n, F) to the target, and its derivative towards more of each image, (n,), mean 0.

    Towards an image x that is |x - T(x)|^2 less its mean over images, up to a constant, where T is the optimal
    transport from the fakes' Gaussian to the target's.
    Source: Villani 2009, "Optimal transport", theorem 5.10 (the potential) and Dowson & Landau 1982 (T).
    """
    own = moments(fake, shift)
    mean, cov = own.mean, own.covariance
    squares, vectors = torch.linalg.eigh(target.root @ cov @ target.root)
    roots = squares.clamp(min=0).sqrt()
    distance = (mean - target.mean).square().sum() + target.trace + cov.trace() - 2 * roots.sum()
    inverse = torch.where(roots > SMALLEST_ROOT * roots.max(), 1 / roots, 0)
    half = target.root @ vectors
    quadratic = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - half * inverse @ half.T
    linear = 2 * (mean - target.mean)
    centred = (piece.double() - mean for piece in fake.split(PIECE))
    influence = torch.cat([((x @ quadratic) * x).sum(1) + x @ linear for x in centred])
    return float(distance), influence - influence.mean()


def frechet_infinity(real: Moments, fake: Tensor, generator: np.random.Generator) -> FrechetInfinity:
    """Extrapolates the distance of features (N, F) to the reference's moments, one random subset per size.

    The subsets share images, so the residuals of the fit say too little of its error. Instead each image's influence
    on the intercept is summed over the subsets it is in, and the error is the root of the sum of squares over images;
    it is conservative where the distance is near 0. The line's own bias (the distance is not quite linear in 1/n)
    outgrows that error with F; the quadratic fit has far less of it, and its wider interval is taken in.
    Source: Jaeckel 1972, "The infinitesimal jackknife"; Efron 1982, chapter 6.

    Raises:
        ValueError: fewer than 5 F images on a side.
    """
    num, width = fake.shape
    require_enough_images(min(num, real.count), width)
    cov = real.covariance
    target = Target(real.mean, sqrt_psd(cov), cov.trace())
    sizes = subset_sizes(num, width)
    line, parabola = fit_weights(sizes, 1), fit_weights(sizes, 2)
    intercepts = np.stack([line[0], parabola[0]])
    shares = torch.zeros(2, num, dtype=torch.float64, device=fake.device)
    values = []
    for size, weights in zip(sizes, intercepts.T, strict=True):
        chosen = torch.from_numpy(generator.permutation(num)[:size]).to(fake.device)
        value, influence = distance_and_influence(target, fake[chosen], real.mean)
        values.append(value)
        shares[:, chosen] += torch.outer(shares.new_tensor(weights), influence / size)
    centres, errors = intercepts @ values, shares.norm(dim=1).cpu().numpy()
    low, high = float((centres - 1.96 * errors).min()), float((centres + 1.96 * errors).max())
    return FrechetInfinity(
        float(centres[0]), (low, high), sizes, values, float(errors[0]), float(line[1] @ values) * sizes[-1]
    )
