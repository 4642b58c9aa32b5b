"""Against curves whose distance is known, and simulated studies (their figures: pytest -s)."""

import math

import numpy as np
import pytest

from fluxflow_train import rng
from fluxflow_train.ablation.rate_distortion import rate_distortion, rates_agree

STUDIES = 1000
RATES = np.array([100.0, 200, 400, 800])


def test_parallel_lines_are_one_distance_apart() -> None:
    """PSNR 4 dB per unit of log rate, arm a 1.5 dB above, at other rates."""
    rate_a, rate_b = np.array([[100.0, 300, 900], [200, 400, 800]]), np.array([[50.0, 150, 600], [50, 150, 500]])
    gap = np.array([[1.5], [1.7]])
    found = rate_distortion(4 * np.log(rate_a) + gap, rate_a, 4 * np.log(rate_b), rate_b)
    assert found.differences == pytest.approx([1.5, 1.7])
    assert found.difference == pytest.approx(1.6)
    assert found.overlap == pytest.approx([math.log(6) / math.log(18), math.log(2.5) / math.log(16)])
    assert (found.num_seeds, found.explanation) == (2, "")
    raw = (4 * np.log(rate_a) + gap - 4 * np.log(rate_b)).mean()
    assert raw > 3  # what a comparison that ignores the rate would have said


def test_curved_lines_by_dense_integration() -> None:
    def quality(rate: np.ndarray) -> np.ndarray:
        return 40 - 60 / np.sqrt(rate)

    rate_a, rate_b = np.geomspace(50, 800, 6)[None], np.geomspace(80, 1500, 6)[None]
    found = rate_distortion(quality(1.2 * rate_a), rate_a, quality(rate_b), rate_b)
    x = np.linspace(math.log(80), math.log(800), 10_001)
    assert found.differences[0] == pytest.approx((quality(1.2 * np.exp(x)) - quality(np.exp(x))).mean(), abs=0.02)


def test_order_and_number_of_points_do_not_matter() -> None:
    rate, quality = np.array([[100.0, 400, 200]]), np.array([[20.0, 30, 25]])
    other = np.array([[400.0, 100]])
    found = rate_distortion(quality, rate, np.array([[29.0, 19.0]]), other)
    assert found.difference == pytest.approx(1.0)


def test_without_overlap_there_is_no_answer() -> None:
    quality = np.array([[20.0, 25], [20, 26], [20, 27]])
    low, high = np.full((3, 2), [100.0, 200]), np.full((3, 2), [300.0, 400])
    found = rate_distortion(quality, low, quality, high)
    assert all(map(math.isnan, found[:4])) and found.num_seeds == 0
    assert found.explanation == "3 of 3 seeds have no rate that both arms reach"
    high[1:] = [150, 250]
    some = rate_distortion(quality, low, quality, high)
    assert some.num_seeds == 2 and some.explanation.startswith("1 of 3 seeds")
    assert math.isnan(some.differences[0]) and math.isfinite(some.difference)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_rate_distortion_covers(num_seeds: int) -> None:
    draw = rng.generator(13, "rate distortion", num_seeds)
    rates = [base * np.exp(0.1 * draw.standard_normal((STUDIES, num_seeds, 4))) for base in (RATES, 1.3 * RATES)]
    seed = draw.standard_normal((STUDIES, num_seeds, 1))
    quality = [4 * np.log(r) + seed + 0.3 * draw.standard_normal(r.shape) for r in rates]
    arms = zip(quality[0] + 0.5, rates[0], quality[1], rates[1], strict=True)
    found = [rate_distortion(*study) for study in arms]
    covered = np.mean([f.low <= 0.5 <= f.high for f in found])
    print(f"rate-distortion: {num_seeds} seeds: covers {covered:.2%}")
    assert 0.93 <= covered <= 0.97


def test_rates_agree() -> None:
    assert rates_agree([100.0, 200], [104.9, 209])
    assert rates_agree([104.9, 209], [100.0, 200])
    assert rates_agree([90.0, 110], [99.0, 100])  # per seed apart, on average alike
    assert not rates_agree([100.0], [105.1])
    assert not rates_agree([[100.0, 100]], [[100.0, 120]])  # one size is enough
    assert rates_agree([100.0], [119.0], tolerance=0.2)


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([], []), ([math.nan], [1.0])])
def test_rates_refuse(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError):
        rates_agree(a, b)


@pytest.mark.parametrize(
    "quality, rate",
    [
        (np.ones((1, 3)), np.ones((1, 2))),
        (np.ones((1, 2)), np.ones((1, 2))),
        (np.ones(2), np.ones(2)),
        (np.ones((2, 2)), np.array([[1.0, 2], [1, 2]])),
    ],
)
def test_rate_distortion_refuses(quality: np.ndarray, rate: np.ndarray) -> None:
    with pytest.raises(ValueError):
        rate_distortion(quality, rate, np.ones((1, 2)), np.array([[1.0, 2.0]]))
