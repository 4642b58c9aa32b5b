"""Moments: against numpy, and where a one-pass covariance would lose its digits."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxflow_train.metrics.frechet import Moments, frechet, gaussian, moments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float64)


def assert_is_numpys(m: Moments, features: Tensor) -> None:
    x = features.double().numpy()
    np.testing.assert_allclose(m.mean.numpy(), x.mean(0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(m.covariance.numpy(), np.cov(x.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num", [2, 50, 4097])
def test_moments_are_numpys_about_any_shift(num: int) -> None:
    x = normal(num, 5) + 1
    for shift in (zeros(5), x[0].double(), x.double().mean(0)):
        m = moments(x, shift)
        assert m.count == num and m.total.dtype == m.outer.dtype == torch.float64
        assert_is_numpys(m, x)


def test_a_shift_near_the_mean_keeps_the_digits() -> None:
    """Features of mean 1e6 and deviation 1e-2: sums of squares about 0 keep no digit of the covariance."""
    x = (normal(400, 4).double() * 1e-2 + 1e6).double()
    expected = torch.cov(x.T)
    kept, lost = moments(x, x[0]).covariance, moments(x, zeros(4)).covariance
    assert (kept - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (lost - expected).abs().max() > 1e-2 * expected.abs().max()


def test_distance_from_moments_is_that_of_the_features() -> None:
    x, y = normal(200, 8), normal(150, 8, seed=1) * 1.3 + 0.2
    a, b = moments(x, x[0]), moments(y, x[0])
    from_moments = frechet(a.mean, a.covariance, b.mean, b.covariance).value
    assert from_moments == pytest.approx(frechet(*gaussian(x), *gaussian(y)).value, rel=1e-11)


def test_too_few_images_have_no_mean_or_covariance() -> None:
    none, one = moments(normal(0, 3), zeros(3)), moments(normal(1, 3), zeros(3))
    with pytest.raises(ValueError, match="got 0"):
        _ = none.mean
    with pytest.raises(ValueError, match="got 1"):
        _ = one.covariance
