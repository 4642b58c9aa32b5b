"""Kernel and Frechet distances and intervals, against loops, scipy and known answers."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from fluxflow_train.metrics.frechet import (
    enough_images,
    fit_projection,
    frechet,
    frechet_of_features,
    gaussian,
)
from fluxflow_train.metrics.intervals import halves_interval, mean_interval
from fluxflow_train.metrics.kid import kid, pair_kernel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_equals_a_naive_loop() -> None:
    x, y = normal(9, 5).numpy(), normal(9, 5, seed=1).numpy() + 0.3

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs]
    assert kid(pair_kernel(torch.tensor(x), torch.tensor(y))) == pytest.approx(np.mean(terms), rel=1e-12)


def test_kid_of_a_set_against_itself_is_zero() -> None:
    x = normal(20, 8)
    assert kid(pair_kernel(x, x)) == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_for_independent_sets() -> None:
    values = [kid(pair_kernel(normal(30, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1))) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5


def test_kid_needs_two_images() -> None:
    with pytest.raises(ValueError, match="got 1"):
        kid(pair_kernel(normal(1, 4), normal(1, 4)))


def test_frechet_of_shifted_gaussians() -> None:
    mean, cov = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    assert frechet(mean, cov, mean + 2, cov).value == pytest.approx(24)
    assert frechet(mean, cov, mean, 9 * cov).value == pytest.approx(6 * (3 - 1) ** 2)


def test_frechet_equals_scipy_and_its_own_check() -> None:
    mean1, cov1 = gaussian(normal(80, 12) @ normal(12, 12, seed=1))
    mean2, cov2 = gaussian(normal(80, 12, seed=2) @ normal(12, 12, seed=3) + 0.5)
    root = np.real(sqrtm(cov1.numpy() @ cov2.numpy()))
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * np.trace(root)
    distance = frechet(mean1, cov1, mean2, cov2)
    assert distance.value == pytest.approx(expected, rel=1e-9)
    assert distance.cross_check < 1e-9 * expected


def test_frechet_survives_singular_covariances() -> None:
    x = normal(40, 2) @ normal(2, 7, seed=1)
    assert frechet_of_features(x, x).value == pytest.approx(0, abs=1e-6)


def test_small_sets_are_refused() -> None:
    assert enough_images(320, 64) and not enough_images(319, 64)
    with pytest.raises(ValueError, match="needs 35 images, got 34"):
        frechet_of_features(normal(34, 7), normal(40, 7))


def test_projection_is_numpys_svd() -> None:
    x = normal(50, 10) @ normal(10, 10, seed=1) + 3
    projection = fit_projection(x, 4)
    centred = x.numpy() - x.numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(projection(x).numpy()), np.abs(u[:, :4] * s[:4]), atol=1e-9)


def test_projection_refuses_too_few_images() -> None:
    with pytest.raises(ValueError, match="got 4"):
        fit_projection(normal(4, 10), 4)


def test_mean_interval_is_the_textbooks() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0, float("inf")]) or (0, 0)
    half = 1.96 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))
    assert mean_interval([1.0]) is None


def test_halves_interval_has_the_width_of_the_standard_error() -> None:
    x = normal(400).numpy()
    low, high = halves_interval(lambda s: float(x[s].mean()), 400, seed=0, num_halves=2000)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)
    assert low < x.mean() < high
