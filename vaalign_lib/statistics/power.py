"""What a number of policies can see: power of the tests of Tables 1 and 3."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, chi2, f, norm, t
from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

from vaalign_lib.statistics.arrays import count, number

LEVEL, POWER = 0.05, 0.8  # the usual ones


def risk_power(first: float, second: float, policies: int) -> float:
    """Return the probability that the one-sided z test finds the first risk to be larger, exactly.

    Both risks are measured on so many policies each.
    """
    for name, risk in (("first", first), ("second", second)):
        number(name, risk, at_least=0, at_most=1)
    counts = np.arange(count("policies", policies) + 1)
    more, fewer = counts[:, None], counts[None, :]  # (counts, 1), (1, counts)
    pooled = (more + fewer) / (2 * policies)  # (counts, counts)
    error = np.sqrt(pooled * (1 - pooled) * 2 / policies)
    seen = (more - fewer) / policies > norm.ppf(1 - LEVEL) * error  # nothing varies: not seen
    seen &= error > 0
    return float(binom.pmf(counts, policies, first) @ seen @ binom.pmf(counts, policies, second))


def policies_for_risks(first: float, second: float) -> int:
    """Return how many policies of each method the one-sided z test needs to see two risks differ."""
    gap = _risk_difference(first, second)
    found = samplesize_proportions_2indep_onetail(gap, second, POWER, alpha=LEVEL, alternative="larger")
    return int(np.ceil(found))


def policies_for_p(first: float, second: float, p: float) -> int:
    """Return from how many policies of each method on two observed risks have so small a p-value."""
    gap, pooled = _risk_difference(first, second), (first + second) / 2
    number("p", p, above=0, below=0.5)  # the larger risk was observed to be larger
    return int(np.ceil((norm.isf(p) / gap) ** 2 * 2 * pooled * (1 - pooled)))


def smallest_risk_seen(second: float, policies: int) -> float:
    """Return the smallest larger risk that the test sees with a power of 80%, beside a smaller one."""

    def lacking(first: float) -> float:
        return risk_power(first, second, policies) - POWER

    return float("nan") if lacking(1.0) < 0 else float(brentq(lacking, second, 1.0, xtol=1e-6))


def smallest_variance_ratio_seen(policies: int) -> float:
    """Return the smallest ratio of variances of normal returns that the two-sided F test sees."""
    degrees = count("policies", policies, least=2) - 1
    law = f(degrees, degrees)
    return float(law.ppf(1 - LEVEL / 2) / law.ppf(1 - POWER))


def smallest_gap_seen(deviation: float, pairs: int) -> float:
    """Return the smallest mean of normal differences, of such a deviation, that the paired t test sees."""
    degrees = count("pairs", pairs, least=2) - 1
    shares = (np.arange(4000) + 0.5) / 4000  # the noncentral t by quantiles of chi-square: scipy's can be NaN
    bars = t.ppf(1 - LEVEL / 2, degrees) * np.sqrt(chi2.ppf(shares, degrees) / degrees)

    def lacking(shift: float) -> float:
        return float((norm.sf(bars - shift) + norm.cdf(-bars - shift)).mean()) - POWER

    shift = brentq(lacking, 0, 4 * bars.max())
    return number("deviation", deviation, at_least=0) * float(shift) / np.sqrt(pairs)


def _risk_difference(first: float, second: float) -> float:
    number("first", first, at_most=1, above=number("second", second, at_least=0))
    return first - second


def coverage_over_worlds(
    worlds: int,
    policies: int,
    between: float,
    gain: float = 3.0,
    effect: float = 0.0,
    draws: int = 20_000,
    seed: int = 0,
) -> dict[str, float]:
    """Return how often 95% intervals of the mean over worlds of ln(V_1 / G_1^2 : V_2 / G_2^2) hold the truth.

    Worlds differ in it by a normal deviation `between`; in each, V and G are the variance and the mean gain
    of so many normal policies of both methods, whose mean is `gain` deviations. `over worlds` is Student's
    interval over the worlds' values, `over policies` the normal one from the policies of these worlds alone,
    which takes the worlds for all there are; `width` is the mean length of the first. If the truth is
    `effect`, `above 0` is how often the first lies above 0, and `below 1.25` below ln 1.25 and not above 0.
    """
    count("worlds", worlds, least=2)
    random = np.random.default_rng(seed)
    truth, degrees = random.normal(0, number("between", between, at_least=0), (draws, worlds)), policies - 1
    logs = np.log(random.chisquare(degrees, (2, draws, worlds)) / degrees)  # (methods, draws, worlds)
    means = np.log(np.abs(random.normal(gain, 1 / np.sqrt(policies), (2, draws, worlds))))
    values = truth + (logs[0] - 2 * means[0]) - (logs[1] - 2 * means[1])  # (draws, worlds)
    centre = values.mean(axis=1)  # (draws,)
    half = t.ppf(1 - LEVEL / 2, worlds - 1) * values.std(axis=1, ddof=1) / np.sqrt(worlds)
    of_policies = 2 * (
        2 / degrees + 4 / (gain**2 * policies)
    )  # variance of one world's value, given the world
    fixed = norm.ppf(1 - LEVEL / 2) * np.sqrt(of_policies / worlds)
    return {
        "over worlds": float((np.abs(centre) <= half).mean()),
        "over policies": float((np.abs(centre) <= fixed).mean()),
        "width": float(2 * half.mean()),
        "above 0": float((centre + effect - half > 0).mean()),
        "below 1.25": float(((centre + effect + half < np.log(1.25)) & (centre + effect - half <= 0)).mean()),
    }
