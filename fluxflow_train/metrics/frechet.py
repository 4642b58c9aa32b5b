"""Frechet distance between Gaussians fitted to two sets of features, on a fixed PCA where the sets are small.

N images, D feature width, K principal components.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Below 5 images per dimension the estimate is mostly bias (EVALUATION.md 2).
IMAGES_PER_DIMENSION = 5
PIECE = 4096


class FrechetDistance(NamedTuple):
    """`cross_check`: absolute difference to an independent computation, of the trace term or of the whole value."""

    value: float
    cross_check: float


class Projection(NamedTuple):
    """Principal components: `mean` (D,), `axes` (D, K), float64. They are not rescaled."""

    mean: Tensor
    axes: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, K), float64."""
        return (features.double() - self.mean) @ self.axes


def fit_projection(features: Tensor, num_components: int) -> Projection:
    """The leading principal components of training features (N, D).

    Raises:
        ValueError: fewer images than components + 1.
    """
    if features.shape[0] <= num_components:
        raise ValueError(f"{num_components} components need more than {num_components} images, got {len(features)}")
    x = features.double()
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh[:num_components].T
    return Projection(mean, axes.contiguous())


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    x = features.double()
    return x.mean(0), torch.cov(x.T)


class Moments(NamedTuple):
    """Sums of `count` features about a fixed `shift` (D,): `total` (D,) of x - shift, `outer` (D, D) of their products.

    All float64. About a vector near the mean the sums do not cancel when the covariance is taken, whatever the
    features' offset.
    """

    count: int
    total: Tensor
    outer: Tensor
    shift: Tensor

    @property
    def mean(self) -> Tensor:
        """(D,). Raises ValueError without an image."""
        if self.count < 1:
            raise ValueError("the mean needs at least 1 image, got 0")
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


def moments(features: Tensor, shift: Tensor) -> Moments:
    """Sums of features (N, D) about `shift` (D,), N >= 0; in pieces, so that no float64 copy of all is made."""
    width = features.shape[1]
    shift = shift.to(features.device, torch.float64)
    total = torch.zeros(width, dtype=torch.float64, device=features.device)
    outer = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for piece in features.split(PIECE):
        x = piece.double() - shift
        total += x.sum(0)
        outer.addmm_(x.T, x)
    return Moments(features.shape[0], total, outer, shift)


def sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> FrechetDistance:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), all float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), symmetric and safe for
    singular covariances; the check takes the singular values of C1^(1/2) C2^(1/2).
    Source: Dowson & Landau 1982; Heusel et al. 2017, eq. 6.
    """
    root1, root2 = sqrt_psd(cov1), sqrt_psd(cov2)
    trace = torch.linalg.eigvalsh(root1 @ cov2 @ root1).clamp(min=0).sqrt().sum()
    check = torch.linalg.svdvals(root1 @ root2).sum()
    value = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return FrechetDistance(float(value), float((trace - check).abs()))


def enough_images(num_images: int, dimension: int) -> bool:
    """Whether a Frechet distance between sets of this size may be reported at all."""
    return num_images >= IMAGES_PER_DIMENSION * dimension


def require_enough_images(num_images: int, dimension: int) -> None:
    """Raises ValueError where `enough_images` does not hold."""
    if not enough_images(num_images, dimension):
        least = IMAGES_PER_DIMENSION * dimension
        raise ValueError(f"a Frechet distance in {dimension} dimensions needs {least} images, got {num_images}")


def frechet_of_features(real: Tensor, fake: Tensor) -> FrechetDistance:
    """Frechet distance between features (N, D) and (M, D).

    Raises:
        ValueError: fewer than 5 D images on a side.
    """
    require_enough_images(min(real.shape[0], fake.shape[0]), real.shape[1])
    return frechet(*gaussian(real), *gaussian(fake))
