"""Precision, recall, density and coverage against loops in numpy and known cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxflow_train.metrics.manifold import ROWS, density_coverage, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    return np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=2)


def radius(x: Tensor, i: int, k: int) -> float:
    return sorted(np.delete(distances(x[i : i + 1], x)[0], i))[k - 1]


def brute_force(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    real_radii = [radius(real, i, k) for i in range(len(real))]
    fake_radii = [radius(fake, j, k) for j in range(len(fake))]
    d = distances(real, fake)
    precision = np.mean([any(d[i, j] <= real_radii[i] for i in range(len(real))) for j in range(len(fake))])
    recall = np.mean([any(d[i, j] <= fake_radii[j] for j in range(len(fake))) for i in range(len(real))])
    density = sum(d[i, j] < real_radii[i] for i in range(len(real)) for j in range(len(fake))) / (k * len(fake))
    coverage = np.mean([any(d[i, j] < real_radii[i] for j in range(len(fake))) for i in range(len(real))])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.6, 0.5), (1.5, 0.0)])
def test_equals_brute_force(k: int, scale: float, offset: float) -> None:
    real, fake = normal(60, 3), normal(45, 3, seed=1) * scale + offset
    expected = brute_force(real, fake, k)
    assert (*precision_recall(real, fake, k), *density_coverage(real, fake, k)) == pytest.approx(expected, abs=1e-12)


def test_more_images_than_a_piece() -> None:
    real, fake = normal(ROWS + 40, 4), normal(ROWS - 30, 4, seed=1) + 0.7
    d = torch.from_numpy(distances(real, fake))
    ball, fake_ball = (
        torch.from_numpy(distances(x, x)).sort(dim=1).values[:, 3] for x in (real, fake)
    )  # column 0 is itself
    expected = float((d <= ball[:, None]).any(0).double().mean()), float((d <= fake_ball).any(1).double().mean())
    assert precision_recall(real, fake) == pytest.approx(expected, abs=1e-12)


def test_a_copy_is_perfect() -> None:
    x = normal(50, 6)
    assert precision_recall(x, x.clone()) == (1, 1)
    assert density_coverage(x, x.clone()) == (pytest.approx(1), 1)


def test_the_rim_belongs_to_the_ball_of_precision_alone() -> None:
    """Two real points with radius 2, fakes at that distance: <= in Kynkaanniemi's definition, < in Naeem's."""
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [-2.0], [5.0], [9.0]])
    assert precision_recall(real, fake, k=1)[0] == 0.5
    assert density_coverage(real, fake, k=1) == (0, 0)


def test_sets_far_apart_share_nothing() -> None:
    assert precision_recall(normal(30, 4), normal(30, 4, seed=1) + 100) == (0, 0)
    assert density_coverage(normal(30, 4), normal(30, 4, seed=1) + 100) == (0, 0)


def test_a_mode_that_is_dropped_costs_recall_and_coverage() -> None:
    """Real images in two far clusters, fakes in one: precise, half recalled, half covered."""
    left, right = normal(200, 3), normal(200, 3, seed=1) + 100
    precision, recall = precision_recall(torch.cat([left, right]), normal(200, 3, seed=2))
    density, coverage = density_coverage(torch.cat([left, right]), normal(200, 3, seed=2))
    assert precision > 0.8 and 0.4 < recall <= 0.5
    assert 0.8 < density < 1.2 and 0.4 < coverage <= 0.5


def test_one_distribution_has_the_published_expectation() -> None:
    """E density = 1, E coverage = 1 - 2^-k for large sets. Source: Naeem et al. 2020, section 3."""
    density, coverage = density_coverage(normal(2000, 8), normal(2000, 8, seed=1), k=5)
    assert density == pytest.approx(1, abs=0.05) and coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_an_offset_changes_nothing() -> None:
    real, fake = normal(80, 5).double(), normal(80, 5, seed=1).double()
    assert precision_recall(real + 1e7, fake + 1e7) == precision_recall(real, fake)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        precision_recall(normal(9, 2), normal(3, 2))
    with pytest.raises(ValueError, match="at least 6 images, got 5"):
        density_coverage(normal(5, 2), normal(9, 2))
    with pytest.raises(ValueError, match="got 0"):
        density_coverage(normal(9, 2), normal(0, 2))
