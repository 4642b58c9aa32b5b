"""Against a t test inverted by brute force, and simulated studies whose ratio is known (their figures: pytest -s)."""

import math

import numpy as np
import pytest
from scipy import stats

from fluxflow_train import rng
from fluxflow_train.ablation.size_ratio import (
    FALLING,
    FLAT,
    NO_SPREAD,
    ONE_SEED,
    RatioSet,
    fieller,
    size_ratio,
)

STUDIES = 2000
SIZES = {2: np.array([1e6, 8e6]), 4: np.array([1e6, 2e6, 4e6, 8e6])}
TRUTH = math.log(2)


def studies(num_seeds: int, num_sizes: int, noise: float, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Quality (studies, S, K) of two arms with slope 1 and ratio 2.

    A seed moves both arms, each arm, and the slope; runs of both arms at one size correlate by 0.5.
    """
    draw = rng.generator(11, "size ratio", num_seeds, num_sizes, index)
    x = np.log(SIZES[num_sizes])
    slope = 1 + noise * draw.standard_normal((STUDIES, num_seeds, 1)) / 2
    both = (x - x.mean()) * slope + draw.standard_normal((STUDIES, num_seeds, 1)) / 2
    both = both + noise * draw.standard_normal((STUDIES, num_seeds, num_sizes)) * math.sqrt(0.5)
    arms = []
    for gain in (TRUTH, 0.0):
        own = noise * draw.standard_normal((STUDIES, num_seeds, num_sizes)) * math.sqrt(0.5)
        arms.append(both + gain + own + noise * draw.standard_normal((STUDIES, num_seeds, 1)) / 2)
    return arms[0], arms[1]


def contains(found: RatioSet, rho: np.ndarray) -> np.ndarray:
    if found.excluded is None:
        return (found.low <= rho) & (rho <= found.high)
    return (rho <= found.excluded[0]) | (rho >= found.excluded[1])


@pytest.mark.parametrize(
    "means, kind", [((1.0, 3.0), "bounded"), ((-2.0, 3.0), "bounded"), ((3.0, 0.3), "excluded"), ((0.1, 0.1), "line")]
)
def test_fieller_is_the_t_test_inverted(means: tuple[float, float], kind: str) -> None:
    draw = rng.generator(11, "fieller").standard_normal((2, 6))
    draw = draw - draw.mean(1, keepdims=True)
    d, b = means[0] + draw[0], means[1] + 0.5 * draw[0] + draw[1]
    found, grid = fieller(d, b, 0.9), np.linspace(-40, 40, 20_001)
    accepted = stats.ttest_1samp(d[:, None] - grid * b[:, None], 0).pvalue >= 0.1
    assert (contains(found, grid) == accepted).all()
    assert (found.bounded, found.excluded is not None) == (kind == "bounded", kind == "excluded")
    assert accepted.all() == (kind == "line")
    assert found.estimate == pytest.approx(means[0] / means[1])


@pytest.mark.parametrize("num_sizes", [2, 4])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_size_ratio_covers(num_seeds: int, num_sizes: int) -> None:
    """A slope that the design sees well; an interval that is not bounded counts as covering, so there are few."""
    a, b = studies(num_seeds, num_sizes, noise=0.1)
    found = [size_ratio(x, y, SIZES[num_sizes]) for x, y in zip(a, b, strict=True)]
    covered, bounded = np.mean([f.low <= 2 <= f.high for f in found]), np.mean([f.bounded for f in found])
    print(f"size ratio: {num_seeds} seeds, {num_sizes} sizes: covers {covered:.2%}, bounded {bounded:.2%}")
    assert 0.93 <= covered <= 0.97
    assert bounded > 0.999


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_sets_cover_where_the_slope_is_weak(num_seeds: int, noise: float) -> None:
    a, b = studies(num_seeds, 4, noise, index=round(10 * noise))
    found = [size_ratio(x, y, SIZES[4]) for x, y in zip(a, b, strict=True)]
    sets = [fieller(f.difference.values, f.slope.values) for f in found]
    covered = np.mean([contains(s, np.array(TRUTH)) for s in sets])
    shown, bounded = np.mean([f.low <= 2 <= f.high for f in found]), np.mean([f.bounded for f in found])
    print(f"weak slope: {num_seeds} seeds, noise {noise}: set {covered:.2%}, shown {shown:.2%}, bounded {bounded:.1%}")
    assert 0.93 <= covered <= 0.97
    assert shown >= covered


def test_parts_are_the_least_squares_fit() -> None:
    """One regression over the means of seeds, with an intercept for each arm."""
    a, b = (x[0] for x in studies(5, 4, 0.1))
    found, x = size_ratio(a, b, SIZES[4]), np.log(SIZES[4])
    ones, zeros = np.ones(4), np.zeros(4)
    design = np.concatenate([np.stack([ones, zeros, x], 1), np.stack([zeros, ones, x], 1)])
    first, second, slope = np.linalg.lstsq(design, np.concatenate([a.mean(0), b.mean(0)]), rcond=None)[0]
    assert (found.intercept_a, found.intercept_b) == pytest.approx((first, second))
    assert found.slope.estimate == pytest.approx(slope)
    assert found.log_ratio == pytest.approx((first - second) / slope)
    assert (found.ratio, found.low, found.high) == pytest.approx(
        tuple(map(math.exp, (found.log_ratio, found.log_low, found.log_high)))
    )
    bends = [np.polyfit(x, row, 2)[0] for row in (a + b) / 2]
    assert found.curvature is not None and found.curvature.values == pytest.approx(bends)
    tilts = [np.polyfit(x, row, 1)[0] for row in a - b]
    assert found.slope_difference.values == pytest.approx(tilts)


def test_arms_swapped_invert_the_ratio() -> None:
    a, b = (x[0] for x in studies(5, 4, 0.1))
    found, swapped = size_ratio(a, b, SIZES[4]), size_ratio(b, a, SIZES[4])
    assert found[:3] == pytest.approx((1 / swapped.ratio, 1 / swapped.high, 1 / swapped.low))


def test_curvature_is_seen() -> None:
    a, b = (x[0] for x in studies(5, 4, 0.1))
    bend = 0.5 * (np.log(SIZES[4]) - np.log(SIZES[4]).mean()) ** 2
    straight, bent = size_ratio(a, b, SIZES[4]).curvature, size_ratio(a + bend, b + bend, SIZES[4]).curvature
    assert straight is not None and bent is not None
    assert bent.estimate == pytest.approx(straight.estimate + 0.5)
    assert straight.low < 0 < straight.high and bent.low > 0
    assert size_ratio(a[:, :2], b[:, :2], SIZES[4][:2]).curvature is None


def test_identical_arms_need_equal_sizes() -> None:
    a, _ = (x[0] for x in studies(5, 4, 0.1))
    assert size_ratio(a, a, SIZES[4])[:3] == (1, 1, 1)


@pytest.mark.parametrize("case", [ONE_SEED, NO_SPREAD, FLAT, FALLING])
def test_no_bound_is_explained(case: str) -> None:
    a, b = (x[0] for x in studies(5, 4, 0.1))
    x = np.log(SIZES[4]) - np.log(SIZES[4]).mean()
    arms = {
        ONE_SEED: (a[:1], b[:1]),
        NO_SPREAD: (b + 0.1, b),
        FLAT: (a - 0.999 * x, b - 0.999 * x),
        FALLING: (-a, -b),
    }
    found = size_ratio(*arms[case], SIZES[4])
    assert not found.bounded and found.explanation == case
    assert (found.low, found.high, found.log_low, found.log_high) == (0, math.inf, -math.inf, math.inf)
    assert math.isnan(found.ratio) == (found.slope.estimate <= 0)
    if case == ONE_SEED:
        assert found.ratio == pytest.approx(math.exp((a[0] - b[0]).mean() / found.slope.estimate))


@pytest.mark.parametrize(
    "a, b, sizes",
    [
        (np.ones((3, 1)), np.ones((3, 1)), [1e6]),
        (np.ones((3, 2)), np.ones((3, 2)), [1e6, 1e6]),
        (np.ones((3, 2)), np.ones((3, 2)), [1e6, 0]),
        (np.ones((3, 2)), np.ones((2, 2)), [1e6, 2e6]),
        (np.ones((3, 2)), np.ones((3, 2)), [1e6, 2e6, 3e6]),
        (np.full((3, 2), np.nan), np.ones((3, 2)), [1e6, 2e6]),
        (np.ones(2), np.ones(2), [1e6, 2e6]),
        (np.ones((0, 2)), np.ones((0, 2)), [1e6, 2e6]),
    ],
)
def test_size_ratio_refuses(a: np.ndarray, b: np.ndarray, sizes: list[float]) -> None:
    with pytest.raises(ValueError):
        size_ratio(a, b, sizes)
