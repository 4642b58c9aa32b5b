"""The Frechet distance that torchmetrics computes, against scipy and in its traps."""

import random

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from fluxflow_train import rng
from fluxflow_train.metrics.fid import StoredFeatures, frechet_value, torchmetrics_frechet
from fluxflow_train.metrics.frechet import moments
from fluxflow_train.metrics.frechet_infinity import frechet_infinity
from fluxflow_train.metrics.kid import kid_interval
from fluxflow_train.metrics.manifold import density_coverage, precision_recall


def skewed(num: int, width: int = 24, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Correlated, non-negative float32 features, as pooled activations are."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(num, width, generator=g) @ mixing + 0.3 * seed).relu() + offset


def scipys(real: Tensor, fake: Tensor) -> float:
    x, y = real.double().numpy(), fake.double().numpy()
    cov1, cov2 = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(cov1 @ cov2))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))


@pytest.mark.parametrize(("num_real", "num_fake"), [(200, 130), (5000, 4099)])
def test_value_is_scipys(num_real: int, num_fake: int) -> None:
    real, fake = skewed(num_real), skewed(num_fake, seed=1)
    expected = scipys(real, fake)
    distance = frechet_value(real, fake)
    assert torchmetrics_frechet(real, fake) == distance.value == pytest.approx(expected, rel=1e-9)
    assert distance.cross_check < 1e-9 * expected


def test_a_large_offset_costs_no_digit() -> None:
    """The same features with 2^17 added to all; torchmetrics alone gets sums of squares of 1e13."""
    x, y = skewed(300).double() + 2.0**17, skewed(300, seed=1).double() + 2.0**17
    expected = scipys(skewed(300), skewed(300, seed=1))
    assert torchmetrics_frechet(x, y) == pytest.approx(expected, rel=1e-9)
    bare = FrechetInceptionDistance(feature=StoredFeatures(24))
    bare.update(x, real=True)
    bare.update(y, real=False)
    assert float(bare.compute()) != pytest.approx(expected, rel=1e-7)


def test_the_result_is_float64() -> None:
    """torchmetrics returns its value in the features' type: in float32 the last digits would be gone."""
    value = torchmetrics_frechet(skewed(200), skewed(200, seed=1))
    assert float(np.float32(value)) != value


def test_the_cross_check_sees_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxflow_train.metrics.fid.torchmetrics_frechet", lambda real, fake: 7.0)
    real, fake = skewed(200), skewed(200, seed=1)
    assert frechet_value(real, fake).cross_check == pytest.approx(7 - scipys(real, fake), rel=1e-9)


def test_a_set_against_itself_is_zero() -> None:
    x = skewed(200)
    assert torchmetrics_frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_small_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 120 images, got 119"):
        frechet_value(skewed(119), skewed(500))
    with pytest.raises(ValueError, match="got 1 and 500"):
        torchmetrics_frechet(skewed(1), skewed(500))


def test_no_global_generator_is_touched_and_draws_repeat() -> None:
    real, fake = skewed(150), skewed(150, seed=1)
    reference = moments(real, real[0])
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()

    def everything() -> list[object]:
        draw = rng.generator(3, "test")
        return [
            frechet_value(real, fake),
            frechet_infinity(reference, fake, draw),
            kid_interval(real, fake, draw),
            precision_recall(real, fake),
            density_coverage(real, fake),
        ]

    first = everything()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[1] and random.getstate() == states[2]
    torch.manual_seed(1)
    assert everything() == first
