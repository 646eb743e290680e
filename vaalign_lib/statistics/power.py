"""What a number of policies can see: power of the tests of Tables 1 and 3."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, f, norm
from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

from vaalign_lib.statistics.arrays import count, number

LEVEL, POWER = 0.05, 0.8  # the usual ones


def risk_power(first: float, second: float, policies: int, level: float = LEVEL) -> float:
    """Return the probability that the one-sided z test finds the first risk to be larger, exactly.

    Both risks are measured on so many policies each.
    """
    for name, risk in (("first", first), ("second", second)):
        number(name, risk, at_least=0, at_most=1)
    _within(level=level)
    counts = np.arange(count("policies", policies) + 1)
    more, fewer = counts[:, None], counts[None, :]
    pooled = (more + fewer) / (2 * policies)
    error = np.sqrt(pooled * (1 - pooled) * 2 / policies)
    seen = (more - fewer) / policies > norm.ppf(1 - level) * error  # nothing varies: not seen
    seen &= error > 0
    return float(binom.pmf(counts, policies, first) @ seen @ binom.pmf(counts, policies, second))


def policies_for_risks(first: float, second: float, power: float = POWER, level: float = LEVEL) -> int:
    """Return how many policies of each method the one-sided z test needs to see two risks differ."""
    _falling(first, second)
    _within(power=power, level=level)
    found = samplesize_proportions_2indep_onetail(
        first - second, second, power, alpha=level, alternative="larger"
    )
    return int(np.ceil(found))


def policies_for_p(first: float, second: float, p: float) -> int:
    """Return from how many policies of each method on two observed risks have so small a p-value."""
    _falling(first, second)
    number("p", p, above=0, below=0.5)  # the larger risk was observed to be larger
    pooled = (first + second) / 2
    return int(np.ceil((norm.isf(p) / (first - second)) ** 2 * 2 * pooled * (1 - pooled)))


def smallest_risk_seen(second: float, policies: int, power: float = POWER, level: float = LEVEL) -> float:
    """Return the smallest larger risk that the test sees with a power, beside a smaller one."""
    _within(power=power, level=level)

    def lacking(first: float) -> float:
        return risk_power(first, second, policies, level) - power

    if lacking(1.0) < 0:
        return float("nan")
    return float(brentq(lacking, second, 1.0, xtol=1e-6))


def smallest_variance_ratio_seen(policies: int, power: float = POWER, level: float = LEVEL) -> float:
    """Return the smallest ratio of variances of normal returns that the two-sided F test sees."""
    _within(power=power, level=level)
    degrees = count("policies", policies, least=2) - 1
    law = f(degrees, degrees)
    return float(law.ppf(1 - level / 2) / law.ppf(1 - power))


def _within(**shares: float) -> None:
    for name, share in shares.items():
        number(name, share, above=0, below=1)


def _falling(first: float, second: float) -> None:
    number("first", first, at_most=1, above=number("second", second, at_least=0))
