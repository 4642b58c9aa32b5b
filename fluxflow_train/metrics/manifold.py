"""Precision, recall, density and coverage: how two sets of features lie within each other's nearest neighbours.

N real and M fake images, F feature width, k neighbours.
"""

import torch
from torch import Tensor

ROWS = 512


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, F) and (M, F), float64, to (n, M); pairs nearer than rounding become 0."""
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return torch.addmm(norms, rows, columns.T, alpha=-2).clamp_(min=0)


def radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each image of (N, F) to its k-th nearest neighbour, itself left out: (N,).

    Raises:
        ValueError: fewer than k + 1 images.
    """
    if len(x) <= k:
        raise ValueError(f"{k} nearest neighbours need at least {k + 1} images, got {len(x)}")
    found = []
    for start in range(0, len(x), ROWS):
        d = squared_distances(x[start : start + ROWS], x)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf
        found.append(d.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def centred(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 less the mean of the real ones: an offset would cancel in the squared distances."""
    mean = real.double().mean(0)
    return real.double() - mean, fake.double() - mean


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Part of the fakes within the k-th neighbour's distance of some real image, and the reverse; (N, F) and (M, F).

    Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models", eq. 1, 2.

    Raises:
        ValueError: fewer than k + 1 images on a side.
    """
    x, y = centred(real, fake)
    real_radii, fake_radii = radii(x, k), radii(y, k)
    precise = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    recalled = []
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        d = squared_distances(x[rows], y)
        precise |= (d <= real_radii[rows, None]).any(0)
        recalled.append((d <= fake_radii).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a fake, over k, and the part of the real balls with a fake in them.

    A ball is what lies nearer to a real image than its k-th real neighbour. Density can exceed 1; between two large
    sets of one distribution it is 1, and coverage is 1 - 2^-k where they are equally large.
    Source: Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", section 3.

    Raises:
        ValueError: fewer than k + 1 real images, or no fake one.
    """
    if not len(fake):
        raise ValueError("density and coverage need at least 1 generated image, got 0")
    x, y = centred(real, fake)
    real_radii = radii(x, k)
    inside, covered = 0, 0
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        within = squared_distances(x[rows], y) < real_radii[rows, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(y)), covered / len(x)
