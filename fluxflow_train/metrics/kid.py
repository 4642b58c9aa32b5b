"""Kernel distance (KID): squared MMD between two sets of features under the cubic polynomial kernel.

N and M images, D feature width, S subsets.
"""

import numpy as np
import torch
from torch import Tensor

ROWS = 2048
NUM_HALVES = 200
INTERVAL_METHOD = f"2.5 to 97.5 % of {NUM_HALVES} pairs of random halves of both sets without replacement"


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a . b / D + 1)^3: (N, D) and (M, D) to (N, M). Source: Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def pair_kernel(real: Tensor, fake: Tensor) -> Tensor:
    """h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), float64 (N, N)."""
    x, y = real.double(), fake.double()
    cross = polynomial_kernel(x, y)
    return polynomial_kernel(x, x) + polynomial_kernel(y, y) - cross - cross.T


def kid(h: Tensor) -> float:
    """Unbiased squared MMD from `pair_kernel`: the mean of h_ij over i != j; may be negative.

    Without the cross pairs i = j it stays unbiased where y_i is the reconstruction of x_i, and is 0 for a perfect one.
    Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6 and eq. 4.

    Raises:
        ValueError: fewer than two images.
    """
    n = h.shape[0]
    if n < 2:
        raise ValueError(f"a kernel distance needs at least 2 images, got {n}")
    return float((h.sum() - h.diagonal().sum()) / (n * (n - 1)))


def kernel_sums(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
    """Sum of k(a_i, b_j) over the pairs of each of S subsets, as columns of 0 and 1: (N, D), (M, D), (N, S), (M, S)."""
    sums = torch.zeros(in_a.shape[1], dtype=torch.float64, device=a.device)
    for rows, weights in zip(a.split(ROWS), in_a.split(ROWS), strict=True):
        for columns, others in zip(b.split(ROWS), in_b.split(ROWS), strict=True):
            sums += (weights * (polynomial_kernel(rows.double(), columns.double()) @ others)).sum(0)
    return sums


def kid_of_subsets(real: Tensor, fake: Tensor, in_real: Tensor, in_fake: Tensor) -> Tensor:
    """Unbiased squared MMD of each pair of subsets, float64 (S,): masks of 0 and 1, float64 (N, S) and (M, S).

    Source: Gretton et al. 2012, "A kernel two-sample test", eq. 3.
    """
    within = []
    for x, mask in ((real, in_real), (fake, in_fake)):
        itself = (x.double().square().sum(1) / x.shape[1] + 1) ** 3
        size = mask.sum(0)
        within.append((kernel_sums(x, x, mask, mask) - itself @ mask) / (size * (size - 1)))
    cross = kernel_sums(real, fake, in_real, in_fake) / (in_real.sum(0) * in_fake.sum(0))
    return within[0] + within[1] - 2 * cross


def kid_of_sets(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD of independent sets (N, D) and (M, D), all images of both; may be negative.

    Raises:
        ValueError: fewer than two images on a side.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images on each side, got {len(real)} and {len(fake)}")
    everything = [torch.ones(len(x), 1, dtype=torch.float64, device=x.device) for x in (real, fake)]
    return float(kid_of_subsets(real, fake, *everything))


def kid_interval(real: Tensor, fake: Tensor, generator: np.random.Generator) -> tuple[float, float]:
    """95 % interval of `kid_of_sets` (N, D), (M, D) over images of both sets (`INTERVAL_METHOD`).

    See `intervals.halves_interval`: the spread of half samples about the whole is that of the whole about the truth,
    and larger where the sets are almost alike, so the interval errs on the wide side there.

    Raises:
        ValueError: fewer than four images on a side.
    """
    if min(len(real), len(fake)) < 4:
        raise ValueError(f"an interval from halves needs at least 4 images on each side, got {len(real)}, {len(fake)}")
    halves = [half_masks(len(x), generator).to(x.device) for x in (real, fake)]
    low, high = np.quantile(kid_of_subsets(real, fake, *halves).cpu().numpy(), [0.025, 0.975])
    return float(low), float(high)


def half_masks(num_images: int, generator: np.random.Generator) -> Tensor:
    """Random halves as columns of 0 and 1, float64 (N, S)."""
    mask = np.zeros((num_images, NUM_HALVES))
    for column in range(NUM_HALVES):
        mask[generator.permutation(num_images)[: num_images // 2], column] = 1
    return torch.from_numpy(mask)
