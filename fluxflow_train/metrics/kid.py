"""Kernel distance (KID): squared MMD between two sets of features under the cubic polynomial kernel.

N images, D feature width.
"""

from torch import Tensor


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
