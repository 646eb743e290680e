"""What a number of policies can see: power of the tests of Tables 1 and 3."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, f, norm
from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

LEVEL, POWER = 0.05, 0.8  # the usual ones


def risk_power(first: float, second: float, policies: int, level: float = LEVEL) -> float:
    """Return the probability that the one-sided z test finds the first risk to be larger, exactly.

    Args:
        first: probability of the larger risk.
        second: of the smaller.
        policies: of each method.
        level: of the test.
    """
    for name, risk in (("first", first), ("second", second)):
        if not 0 <= risk <= 1:
            raise ValueError(f"{name}: expected a probability, got {risk}")
    if policies < 1:
        raise ValueError(f"policies: expected at least one, got {policies}")
    counts = np.arange(policies + 1)
    more, fewer = counts[:, None], counts[None, :]
    pooled = (more + fewer) / (2 * policies)
    error = np.sqrt(pooled * (1 - pooled) * 2 / policies)
    seen = (more - fewer) / policies > norm.ppf(1 - level) * error  # nothing varies: not seen
    seen &= error > 0
    return float(binom.pmf(counts, policies, first) @ seen @ binom.pmf(counts, policies, second))


def policies_for_risks(
    first: float, second: float, power: float = POWER, level: float = LEVEL
) -> int:
    """Return how many policies of each method the one-sided z test needs to see two risks differ."""
    if not 0 <= second < first <= 1:
        raise ValueError(f"first, second: expected 0 <= second < first <= 1, got {first}, {second}")
    found = samplesize_proportions_2indep_onetail(
        first - second, second, power, alpha=level, alternative="larger"
    )
    return int(np.ceil(found))


def policies_for_p(first: float, second: float, p: float) -> int:
    """Return from how many policies of each method on two observed risks have so small a p-value."""
    if not 0 <= second < first <= 1:
        raise ValueError(f"first, second: expected 0 <= second < first <= 1, got {first}, {second}")
    if not 0 < p < 0.5:  # the larger risk was observed to be larger
        raise ValueError(f"p: expected a number between 0 and 0.5, got {p}")
    pooled = (first + second) / 2
    return int(np.ceil((norm.isf(p) / (first - second)) ** 2 * 2 * pooled * (1 - pooled)))


def smallest_risk_seen(
    second: float, policies: int, power: float = POWER, level: float = LEVEL
) -> float:
    """Return the smallest larger risk that the test sees with a power, beside a smaller one."""

    def lacking(first: float) -> float:
        return risk_power(first, second, policies, level) - power

    if lacking(1.0) < 0:
        return float("nan")
    return float(brentq(lacking, second, 1.0, xtol=1e-6))


def smallest_variance_ratio_seen(
    policies: int, power: float = POWER, level: float = LEVEL
) -> float:
    """Return the smallest ratio of variances of normal returns that the two-sided F test sees."""
    if policies < 2:
        raise ValueError(f"policies: expected at least two, got {policies}")
    law = f(policies - 1, policies - 1)
    return float(law.ppf(1 - level / 2) / law.ppf(1 - power))
