"""How many seeds a paired comparison needs, and what the seeds at hand could have found."""

import math
from functools import lru_cache

from scipy import integrate, optimize, special

POWER = 0.8
REACH = 9.0  # standard deviations of a normal number, beyond which lies less than 1e-18


def power_at(noncentrality: float, num_pairs: int, alpha: float) -> float:
    """Probability that the two-sided paired t test rejects, with noncentrality = sqrt(num_pairs) effect / sd.

    That of |x| > t s for normal x with this mean and sd 1, and s^2 chi-square with df = num_pairs - 1 over df: the two
    tails of the noncentral t, integrated over x. (scipy's `nct` is nan for the far tail of few pairs.)
    Source: Johnson & Welch 1940, "Applications of the non-central t-distribution".
    """
    df, low, high = num_pairs - 1, noncentrality - REACH, noncentrality + REACH
    t = float(special.stdtrit(df, 1 - alpha / 2))

    def rejected(x: float) -> float:
        return math.exp(-((x - noncentrality) ** 2) / 2) * float(special.chdtr(df, df * (x / t) ** 2))

    turns = [x for x in (-t, 0.0, t) if low < x < high]  # where the second factor bends
    area = integrate.quad(rejected, low, high, points=turns or None, epsabs=1e-11, epsrel=1e-11, limit=200)[0]
    return area / math.sqrt(2 * math.pi)


@lru_cache
def detectable_noncentrality(num_pairs: int, alpha: float, power: float) -> float:
    """Where `power_at` is `power`."""
    high = 1.0
    while power_at(high, num_pairs, alpha) < power:
        high *= 2
    return optimize.root_scalar(
        lambda x: power_at(x, num_pairs, alpha) - power, bracket=(0, high), method="brentq", xtol=1e-10
    ).root


def minimum_detectable_effect(sd: float, num_pairs: int, alpha: float = 0.05, power: float = POWER) -> float:
    """The difference that the two-sided paired t test at level `alpha` finds with probability `power`.

    In units of `sd`, the standard deviation of the differences; infinite for one pair, which allows no test. Exact, by
    the noncentral t. Source: Johnson & Welch 1940, "Applications of the non-central t-distribution".

    Raises:
        ValueError: num_pairs < 1, sd negative or not finite, or not 0 < alpha < power < 1.
    """
    if num_pairs < 1 or not 0 < alpha < power < 1:
        raise ValueError(f"needs a pair and 0 < alpha < power < 1, got {num_pairs}, {alpha} and {power}")
    if num_pairs == 1:
        return math.inf
    if not 0 <= sd < math.inf:
        raise ValueError(f"sd must be finite and not negative, got {sd}")
    return sd * detectable_noncentrality(num_pairs, alpha, power) / math.sqrt(num_pairs)


def pairs_needed(sd: float, effect: float, alpha: float = 0.05, power: float = POWER) -> int:
    """The fewest seeds (2 at least) whose minimum detectable effect is at most |effect|; see it for units and source.

    Raises:
        ValueError: effect 0 or not finite, sd negative or not finite, or not 0 < alpha < power < 1.
    """
    if effect == 0 or not math.isfinite(effect):
        raise ValueError(f"no number of pairs finds an effect of {effect}")
    low, high = 1, 2
    while minimum_detectable_effect(sd, high, alpha, power) > abs(effect):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if minimum_detectable_effect(sd, middle, alpha, power) > abs(effect):
            low = middle
        else:
            high = middle
    return high
