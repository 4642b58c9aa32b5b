"""FID-infinity: Gaussians of known distance, and intervals that hold it as often as they say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.metrics.frechet import Moments, frechet, frechet_of_features, moments, sqrt_psd
from fluxflow_train.metrics.frechet_infinity import (
    FrechetInfinity,
    Target,
    distance_and_influence,
    fit_weights,
    frechet_infinity,
    subset_sizes,
)
from fluxflow_train.metrics.intervals import halves_interval


def exactly(mean: Tensor, cov: Tensor, count: int = 10**6) -> Moments:
    """Moments whose mean and covariance are these."""
    return Moments(count, torch.zeros_like(mean), cov * (count - 1), mean)


class Known:
    """A reference and normal generated features (N, F) at a known distance from it."""

    def __init__(self, width: int, decay: float, scale: float, shift: float) -> None:
        spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
        mean, cov = torch.zeros(width, dtype=torch.float64), torch.diag(spectrum)
        self.reference = exactly(mean, cov)
        self.mean, self.deviation = shift * spectrum.sqrt(), scale * spectrum.sqrt()
        self.true = frechet(mean, cov, self.mean, cov * scale**2).value

    def draw(self, num: int, seed: int) -> Tensor:
        noise = torch.randn(num, len(self.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (noise * self.deviation + self.mean).float()

    def measure(self, num: int, seed: int) -> FrechetInfinity:
        return frechet_infinity(self.reference, self.draw(num, seed), rng.generator(seed, "test"))


def holds(interval: tuple[float, float], true: float) -> bool:
    return interval[0] <= true <= interval[1]


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (1.05, 0.05), (1.2, 0.2)], ids=["perfect", "close", "distant"]
)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_interval_holds_the_true_distance_where_the_plain_one_does_not(
    decay: float, scale: float, shift: float
) -> None:
    """50 draws each: a 95 % interval fails more than 7 times with probability 0.1 %; plain is the value at n = N."""
    known = Known(16, decay, scale, shift)
    results = [known.measure(400, seed) for seed in range(50)]
    assert sum(holds(r.interval, known.true) for r in results) >= 43
    plain = np.array([r.values[-1] for r in results])
    assert np.mean(plain - known.true) > 4 * np.std(plain) / 50**0.5
    assert abs(np.mean([r.value for r in results]) - known.true) < 0.35 * np.mean(plain - known.true)


def test_plain_interval_misses_what_this_one_holds() -> None:
    """One set of 2,000: the plain distance with its own interval from halves lies wholly above the truth."""
    known = Known(16, 0.0, 1.02, 0.0)
    fake = known.draw(2000, seed=0)
    reference = known.reference

    def plain(chosen: np.ndarray) -> float:
        m = moments(fake[chosen], reference.mean)
        return frechet(reference.mean, reference.covariance, m.mean, m.covariance).value

    low, high = halves_interval(plain, 2000, seed=0, num_halves=50)
    assert not holds((low, high), known.true)
    infinity = known.measure(2000, seed=0)
    assert holds(infinity.interval, known.true) and infinity.interval[1] < plain(np.arange(2000))


def test_interval_holds_where_the_line_is_biased() -> None:
    """Many dimensions and few images: the distance bends in 1/n, and the line alone falls short of the truth."""
    known = Known(256, 0.0, 1.0, 0.0)
    results = [known.measure(1280, seed) for seed in range(2)]
    assert all(r.value + 1.96 * r.intercept_se < known.true for r in results)
    assert all(holds(r.interval, known.true) for r in results)


def test_standard_error_is_the_spread_of_the_intercept() -> None:
    known = Known(8, 1.0, 1.3, 0.5)
    results = [known.measure(400, seed) for seed in range(60)]
    assert np.mean([r.intercept_se for r in results]) == pytest.approx(np.std([r.value for r in results]), rel=0.25)


def test_influence_is_what_leaving_an_image_out_changes() -> None:
    known = Known(6, 0.5, 1.2, 0.3)
    fake = known.draw(500, seed=0)
    cov = known.reference.covariance
    target = Target(known.reference.mean, sqrt_psd(cov), cov.trace())
    distance, influence = distance_and_influence(target, fake, fake[0])
    m = moments(fake, fake[0])
    assert distance == pytest.approx(frechet(target.mean, cov, m.mean, m.covariance).value, rel=1e-10)
    rest = [torch.cat([fake[:i], fake[i + 1 :]]) for i in range(40)]
    left_out = [499 * (distance - distance_and_influence(target, x, fake[0])[0]) for x in rest]
    assert np.corrcoef(left_out, influence[:40].numpy())[0, 1] > 0.999
    assert np.std(left_out) == pytest.approx(float(influence[:40].std(correction=0)), rel=0.02)


def test_fit_is_numpys() -> None:
    sizes = [100, 130, 200, 400]
    values = np.array([3.0, 2.5, 1.0, 0.7])
    for degree in (1, 2):
        expected = np.polynomial.polynomial.polyfit(400 / np.array(sizes), values, degree, w=np.sqrt(sizes))
        np.testing.assert_allclose(fit_weights(sizes, degree) @ values, expected, rtol=1e-9)


def test_line_and_its_points() -> None:
    known = Known(8, 0.0, 1.1, 0.1)
    fake = known.draw(300, seed=1)
    r = known.measure(300, seed=1)
    m = moments(fake, fake[0])
    assert r.sizes[-1] == 300
    assert r.values[-1] == pytest.approx(
        frechet(known.reference.mean, known.reference.covariance, m.mean, m.covariance).value, rel=1e-9
    )
    slope, value = np.polyfit(1 / np.array(r.sizes), r.values, 1, w=np.sqrt(r.sizes))
    assert (r.value, r.slope) == (pytest.approx(value), pytest.approx(slope))
    assert r.interval[0] <= r.value - 1.96 * r.intercept_se < r.value + 1.96 * r.intercept_se <= r.interval[1]


@pytest.mark.parametrize(("num", "width", "least"), [(10_000, 64, 1000), (10_000, 500, 2500), (6000, 1000, 3000)])
def test_sizes_are_evenly_spaced_in_the_inverse(num: int, width: int, least: int) -> None:
    sizes = subset_sizes(num, width)
    assert len(sizes) == 15 and (sizes[0], sizes[-1]) == (least, num)
    steps = np.diff(1 / np.array(sizes))
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)


def test_features_that_are_constant_are_no_trouble() -> None:
    """A dead unit on both sides: its variance is 0, and the rest is as without it (the sizes are too: N / 10 > 5 F)."""
    known = Known(8, 0.0, 1.1, 0.1)
    fake = known.draw(600, seed=1)
    cov = torch.nn.functional.pad(known.reference.covariance, (0, 1, 0, 1))
    dead = frechet_infinity(
        exactly(torch.nn.functional.pad(known.reference.mean, (0, 1)), cov),
        torch.nn.functional.pad(fake, (0, 1)),
        rng.generator(1, "test"),
    )
    without = known.measure(600, seed=1)
    assert dead.value == pytest.approx(without.value, rel=1e-6)
    assert dead.intercept_se == pytest.approx(without.intercept_se, rel=1e-6)


def test_small_sets_are_refused_and_the_smallest_allowed_is_not() -> None:
    known = Known(8, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="needs 40 images, got 39"):
        known.measure(39, seed=0)
    few = Moments(39, *known.reference[1:])
    with pytest.raises(ValueError, match="needs 40 images, got 39"):
        frechet_infinity(few, known.draw(100, 0), rng.generator(0, "test"))
    assert holds(known.measure(40, seed=0).interval, known.true)
    with pytest.raises(ValueError, match="got 39"):
        frechet_of_features(known.draw(39, 0), known.draw(100, 1))
