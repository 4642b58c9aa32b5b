"""Against scipy's tests, arithmetic by hand, and simulated studies whose truth is known (their figures: pytest -s)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

from fluxflow_train import rng
from fluxflow_train.ablation.power import minimum_detectable_effect, pairs_needed, power_at
from fluxflow_train.ablation.statistics import equivalence, factorial, holm, mean_interval, paired_difference

STUDIES = 2000
SEEDS = [3, 5, 10]
ERRS_BY_CHANCE = stats.binom.ppf(0.999, STUDIES, 0.05) / STUDIES  # an error of 5 % shows at most this


def pairs(purpose: str, num_seeds: int, difference: float, correlation: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """a, b (studies, S): a seed effect as large as the noise, noise of sd 1 with this correlation between the arms."""
    draw = rng.generator(7, purpose, num_seeds, round(100 * correlation)).standard_normal((3, STUDIES, num_seeds))
    other = correlation * draw[1] + math.sqrt(1 - correlation**2) * draw[2]
    return 30 + difference + draw[0] + draw[1], 30 + draw[0] + other


def test_mean_interval_is_scipys() -> None:
    x = rng.generator(1, "mean").normal(3, 2, 6)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert mean_interval(x, 0.9) == pytest.approx((x.mean(), expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize("x", [[2.0], [0.1, 0.1, 0.1]])
def test_no_spread_has_no_interval(x: list[float]) -> None:
    assert mean_interval(x) == (pytest.approx(x[0]), -math.inf, math.inf)


def test_paired_difference_is_scipys() -> None:
    a, b = (x[0] for x in pairs("reference", 6, 0.5, 0.4))
    found, expected = paired_difference(a, b, 0.99), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.99)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-10)
    assert found.correlation == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-10)
    assert (found.difference, found.sd) == pytest.approx(((a - b).mean(), (a - b).std(ddof=1)), rel=1e-10)
    assert found.minimum_detectable_effect == pytest.approx(minimum_detectable_effect(found.sd, 6, 0.01, 0.8))


def test_one_pair_says_nothing() -> None:
    found = paired_difference([2.0], [1.0])
    assert found[:3] == (1, -math.inf, math.inf)
    assert math.isnan(found.p_value) and math.isnan(found.correlation) and math.isnan(found.sd)
    assert found.minimum_detectable_effect == math.inf
    assert not equivalence([2.0], [1.0], 100).equivalent


def test_identical_arms_are_equal() -> None:
    found = paired_difference([1.1, 2.2, 3.3], [1.1, 2.2, 3.3])
    assert (*found[:3], found.p_value) == (0, 0, 0, 1)
    assert equivalence([1.1, 2.2, 3.3], [1.1, 2.2, 3.3], 0.01).equivalent


def test_equal_differences_are_no_certainty() -> None:
    a, b = [1.1, 2.2, 3.3], [1.0, 2.1, 3.2]  # equal but for rounding: a t value of 1e15
    found, same = paired_difference(a, b), equivalence(a, b, 0.5)
    assert found[1:4] == (-math.inf, math.inf, 0) and math.isnan(found.p_value)
    assert not same.equivalent and math.isnan(same.p_value)


def test_two_pairs_have_no_correlation() -> None:
    assert math.isnan(paired_difference([1.0, 2.0], [1.0, 2.5]).correlation)
    assert math.isnan(paired_difference([1.0, 1.0, 1.0], [1.0, 2.5, 2.0]).correlation)


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]]), ([1.0, math.nan], [1.0, 2.0])])
def test_pairs_that_are_none(a: list, b: list) -> None:
    with pytest.raises(ValueError):
        paired_difference(a, b)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference([1.0, 2.0], [2.0, 4.0], confidence)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("num_seeds", SEEDS)
def test_difference_covers(num_seeds: int, correlation: float) -> None:
    found = [paired_difference(a, b) for a, b in zip(*pairs("cover", num_seeds, 0.7, correlation), strict=True)]
    covered = np.mean([f.low <= 0.7 <= f.high for f in found])
    print(f"difference: {num_seeds} seeds, correlation {correlation}: covers {covered:.2%}")
    assert 0.93 <= covered <= 0.97


def test_holm_by_hand() -> None:
    nan = math.nan
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([nan, 0.03, nan, 0.9, 0.02]) == pytest.approx([nan, 0.06, nan, 0.9, 0.06], nan_ok=True)
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert holm([]).shape == (0,)


@given(arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1)))
def test_holm_is_the_step_down_test(p: np.ndarray) -> None:
    """Rejected at 5 % by adjusted values exactly where the procedure itself rejects."""
    rejected, left = set(), sorted(range(len(p)), key=lambda i: p[i])
    while left and p[left[0]] * len(left) <= 0.05:
        rejected.add(left.pop(0))
    assert {i for i, q in enumerate(holm(p)) if q <= 0.05} == rejected


@pytest.mark.parametrize("p", [[-0.1], [1.1], [[0.5]], [math.inf]])
def test_holm_refuses(p: list) -> None:
    with pytest.raises(ValueError):
        holm(p)


def test_holm_controls_the_family() -> None:
    """Four arms against one, so tests are dependent; the first two don't differ from it."""
    draw = rng.generator(7, "family").standard_normal((STUDIES, 5, 5)) + np.array([0, 0, 0, 1.5, 3])[:, None]
    adjusted = [holm([paired_difference(study[arm], study[0]).p_value for arm in range(1, 5)]) for study in draw]
    error = np.mean([(p[:2] <= 0.05).any() for p in adjusted])
    print(f"Holm: family-wise error {error:.2%}")
    assert error <= ERRS_BY_CHANCE


def test_equivalence_is_two_one_sided_tests() -> None:
    for a, b in zip(*(x[:20] for x in pairs("reference", 5, 0.3)), strict=True):
        found = equivalence(a, b, 2.0)
        sides = stats.ttest_1samp(a - b, -2, alternative="greater"), stats.ttest_1samp(a - b, 2, alternative="less")
        assert found.p_value == pytest.approx(max(side.pvalue for side in sides), rel=1e-9)
        interval = stats.ttest_rel(a, b).confidence_interval(0.9)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert found.equivalent == (found.low > -2 and found.high < 2)


def error_at_margin(num_seeds: int, margin: float) -> float:
    """Exact: differences of sd 1 whose mean is the margin look equivalent where |u| < mu - t s, u normal about mu."""
    df, mu, t = num_seeds - 1, margin * math.sqrt(num_seeds), stats.t.ppf(0.95, num_seeds - 1)

    def density(s: float) -> float:
        inside = stats.norm.cdf(-t * s) - stats.norm.cdf(t * s - 2 * mu)
        return inside * stats.chi.pdf(s, df, scale=1 / math.sqrt(df))

    return integrate.quad(density, 0, min(mu / t, 8), epsabs=1e-9, limit=200)[0]


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0, 20.0])  # in sd of the differences
@pytest.mark.parametrize("num_seeds", SEEDS)
def test_equivalence_errs_at_most_5_percent(num_seeds: int, margin: float) -> None:
    """At the margin, where it errs most. It errs 5 % with a wide margin, which shows as more or less in 2,000 studies:
    so the studies are held against the exact value, and that against 5 %."""
    noise = math.sqrt(2)
    studies = zip(*pairs(f"margin {margin}", num_seeds, margin * noise), strict=True)
    error = np.mean([equivalence(a, b, margin * noise).equivalent for a, b in studies])
    exact = error_at_margin(num_seeds, margin)
    print(f"equivalence: {num_seeds} seeds, margin {margin} sd: errs {error:.2%}, exactly {exact:.3%}")
    assert exact <= 0.05 + 1e-6
    assert error == pytest.approx(exact, abs=4 * math.sqrt(0.05 * 0.95 / STUDIES))


@pytest.mark.parametrize("margin, alpha", [(0, 0.05), (-1, 0.05), (math.inf, 0.05), (1, 0.5), (1, 0)])
def test_equivalence_refuses(margin: float, alpha: float) -> None:
    with pytest.raises(ValueError):
        equivalence([1.0, 2.0], [1.0, 2.1], margin, alpha)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 10])
def test_minimum_detectable_effect_has_its_power(num_pairs: int) -> None:
    effect, draws = minimum_detectable_effect(2.0, num_pairs, 0.05, 0.8), 40_000
    d = rng.generator(7, "power", num_pairs).normal(effect, 2.0, (draws, num_pairs))
    found = (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    print(f"power: {num_pairs} pairs, effect {effect / 2:.3f} sd: found {found:.2%}")
    assert found == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / draws))


@pytest.mark.parametrize("num_pairs, noncentrality", [(3, 3.0), (5, 2.0), (10, 0.0), (100, 2.8)])
def test_power_is_the_noncentral_ts(num_pairs: int, noncentrality: float) -> None:
    df, critical = num_pairs - 1, stats.t.ppf(0.975, num_pairs - 1)
    expected = stats.nct.sf(critical, df, noncentrality) + stats.nct.cdf(-critical, df, noncentrality)
    assert power_at(noncentrality, num_pairs, 0.05) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("num_pairs", [2, 3, 10, 1000])
def test_pairs_needed_inverts_the_effect(num_pairs: int, alpha: float) -> None:
    effect = minimum_detectable_effect(1.0, num_pairs, alpha)
    assert power_at(effect * math.sqrt(num_pairs), num_pairs, alpha) == pytest.approx(0.8, abs=1e-8)
    assert pairs_needed(1.0, -effect * 1.0001, alpha) == num_pairs
    assert pairs_needed(1.0, effect * 0.9999, alpha) == num_pairs + 1


def test_power_at_the_edges() -> None:
    assert minimum_detectable_effect(1.0, 1) == math.inf
    assert minimum_detectable_effect(0.0, 5) == 0
    assert pairs_needed(0.0, 0.1) == 2
    for arguments in [(1.0, 0), (-1.0, 3), (math.nan, 3), (1.0, 3, 0.05, 0.04), (1.0, 3, 0, 0.8)]:
        with pytest.raises(ValueError):
            minimum_detectable_effect(*arguments)
    with pytest.raises(ValueError):
        pairs_needed(1.0, 0.0)


def test_factorial_recovers_its_terms() -> None:
    y = np.array([[[5.0, 6.0], [3.0, 4.5]], [[2.0, 3.0], [1.0, 1.5]]])
    found = factorial(y)
    assert found.vae.values == pytest.approx([2.5, 3.0])  # (5+3-2-1)/2, (6+4.5-3-1.5)/2
    assert found.flow.values == pytest.approx([1.5, 1.5])  # (5+2-3-1)/2, (6+3-4.5-1.5)/2
    assert found.interaction.values == pytest.approx([1.0, 0.0])  # (5-3)-(2-1), (6-4.5)-(3-1.5)
    assert found.means == pytest.approx(np.array([[5.5, 3.75], [2.5, 1.25]]))
    expected = stats.ttest_1samp([2.5, 3.0], 0)
    assert found.vae.p_value == pytest.approx(expected.pvalue)
    assert (found.vae.low, found.vae.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert math.isnan(found.flow.p_value)  # both seeds gave 1.5


@pytest.mark.parametrize("num_seeds", SEEDS)
def test_factorial_covers(num_seeds: int) -> None:
    """Effects that vary over seeds by themselves: the seed's, the VAE's at a seed, and noise of every cell."""
    draw = rng.generator(7, "factorial", num_seeds)
    cells = np.array([[0.8, 0.1], [0.3, -0.2]])[None, :, :, None] + draw.standard_normal((STUDIES, 1, 1, num_seeds))
    cells = cells + draw.standard_normal((STUDIES, 2, 1, num_seeds)) * 0.5
    cells = cells + draw.standard_normal((STUDIES, 2, 2, num_seeds)) * 0.3
    found = [factorial(study) for study in cells]
    for name, truth in {"vae": 0.4, "flow": 0.6, "interaction": 0.2}.items():
        effects = [getattr(f, name) for f in found]
        covered = np.mean([e.low <= truth <= e.high for e in effects])
        print(f"factorial {name}: {num_seeds} seeds: covers {covered:.2%}")
        assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 4), (2, 2, 0)])
def test_factorial_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        factorial(np.zeros(shape))
