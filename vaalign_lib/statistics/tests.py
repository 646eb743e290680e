"""Estimates with 95% intervals, and tests, from scipy and statsmodels.

Tests take variances, means and counts where those are enough: printed numbers are tested like measured ones.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint, proportions_ztest

from vaalign_lib.statistics.arrays import Array, count, number, numbers

CONFIDENCE = 0.95
TAILS = 0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2  # probabilities at the ends of a two-sided interval
Z = float(stats.norm.ppf(TAILS[1]))
_NO_SPREAD = "all samples are equal, there is no spread to compare"


@dataclass(frozen=True)
class Estimate:
    """A number, its confidence interval, and how many samples it rests on; NaN where none was found."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        value, low, high = self.texts()
        return "not found" if np.isnan(self.value) else f"{value} [{low}, {high}]"

    def texts(self) -> tuple[str, str, str]:
        """Return value, low and high to the second digit of the interval's half width, and to further ones
        where an end would otherwise move to 0 or 1, or past them.
        """
        numbers = self.value, self.low, self.high
        half = (self.high - self.low) / 2
        if not (np.isfinite(numbers).all() and half > 0):
            return f"{self.value:.3g}", f"{self.low:.3g}", f"{self.high:.3g}"
        places = max(0, 1 - int(np.floor(np.log10(half))))
        ends = [(end, mark) for end in (self.low, self.high) for mark in (0, 1)]
        while any(np.sign(end - mark) != np.sign(round(end, places) - mark) for end, mark in ends):
            places += 1
        value, low, high = (f"{one:.{places}f}" if places < 6 else f"{one:.3g}" for one in numbers)
        return value, low, high

    def columns(self, name: str) -> dict[str, float]:
        """Return the number and its ends as columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def around(value: float, half: float, count: int) -> Estimate:
    """Return an estimate whose interval reaches equally far to either side."""
    return Estimate(float(value), float(value - half), float(value + half), count)


def rounded(value: Any, digits: int) -> Any:
    """Return a finite float with so many significant digits, and anything else as it is."""
    if isinstance(value, float) and np.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value


def proportion(events: ArrayLike) -> Estimate:
    """Estimate a probability from independent events (count,), with Clopper-Pearson's interval.

    Raises:
        ValueError: there is none, or one is neither true nor false; of missing ones nothing is assumed.
    """
    happened = numbers("events", events, axes=1, whole=True, at_least=0, at_most=1)
    successes = int(happened.sum())
    low, high = proportion_confint(successes, happened.size, alpha=1 - CONFIDENCE, method="beta")
    return Estimate(successes / happened.size, float(low), float(high), happened.size)


def mean(samples: ArrayLike) -> Estimate:
    """Estimate a mean from independent samples (count,), with Student's interval."""
    values = checked("samples", samples)
    half = stats.t.ppf(TAILS[1], values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return around(values.mean(), half, values.size)


def variance(samples: ArrayLike) -> Estimate:
    """Estimate a variance from independent samples (count,), with Bonett's interval (2006).

    It is that of the logarithm, with the error that follows from the samples' kurtosis, and two
    corrections for small counts. Samples need not be normal. Equal samples have no interval: NaN.
    """
    values = checked("samples", samples)
    found, n = float(values.var(ddof=1)), values.size
    if np.ptp(values) == 0:
        return Estimate(0.0, float("nan"), float("nan"), n)
    trimmed = stats.trim_mean(values, 0.5 / np.sqrt(n - 4) if n > 4 else 0.0)
    squares = ((values - values.mean()) ** 2).mean()
    kurtosis = ((values - trimmed) ** 4).mean() / squares**2
    small = n / (n - Z)
    half = Z * small * np.sqrt((kurtosis - 1 + 3 / n) / (n - 1))
    return Estimate(found, float(small * found * np.exp(-half)), float(small * found * np.exp(half)), n)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Estimate the first minus the second, which err independently, from their intervals.

    Each end is as far off as both intervals' ends on that side, squares added (MOVER, Zou and Donner
    2008); the intervals need not be symmetric.
    """
    value = first.value - second.value
    below = np.hypot(first.value - first.low, second.high - second.value)
    above = np.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, float(value - below), float(value + above), first.count)


def median(samples: ArrayLike) -> Estimate:
    """Estimate a median from independent samples (count,), with the order-statistics interval."""
    values = np.sort(checked("samples", samples))
    low = int(stats.binom.ppf(TAILS[0], values.size, 0.5))  # P(fewer than low below) < 2.5%
    if low < 1:
        raise ValueError(f"samples: {values.size} are too few for a {CONFIDENCE:.0%} interval")
    ends = float(values[low - 1]), float(values[values.size - low])
    return Estimate(float(np.median(values)), *ends, values.size)


def spearman(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Estimate Spearman's correlation of paired samples (count,), with Fisher's interval and the variance
    (1 + r^2 / 2) / (n - 3) of Bonett and Wright (2000).
    """
    a, b = _pairs("first", first, "second", second)
    if a.size < 4:
        raise ValueError(f"first: expected at least four samples, got {a.size}")
    r = float(stats.spearmanr(a, b).statistic)
    half = Z * np.sqrt((1 + r**2 / 2) / (a.size - 3))
    with np.errstate(divide="ignore"):  # at 1 and -1
        low, high = np.tanh(np.arctanh(np.clip(r, -1, 1)) + np.array([-half, half]))
    return Estimate(r, float(low), float(high), a.size)


def rank_correlations(first: Array, second: Array) -> Array:
    """Return Spearman's correlation along the last axis, broadcast over the others."""
    ranks = [stats.rankdata(one, axis=-1) for one in (first, second)]
    centred = [one - one.mean(-1, keepdims=True) for one in ranks]
    product = (centred[0] * centred[1]).sum(-1)  # (...)
    return product / np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))


def paired_variance_ratio(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    """Estimate Var(numerator) / Var(denominator) from paired samples (count,).

    The interval is that of the logarithm by the delta method: sample i moves it by
    (a_i - mean)^2 / Var(a) - (b_i - mean)^2 / Var(b), over the count. It needs no normality and
    allows for the pairing, but the count must be large.
    """
    a, b = _pairs("numerator", numerator, "denominator", denominator)
    variances = a.var(ddof=1), b.var(ddof=1)
    if min(variances) == 0:
        raise ValueError("numerator, denominator: all samples are equal, the ratio is undefined")
    influence = (a - a.mean()) ** 2 / variances[0] - (b - b.mean()) ** 2 / variances[1]
    half = Z * influence.std(ddof=1) / np.sqrt(a.size)
    ratio = variances[0] / variances[1]
    return Estimate(float(ratio), float(ratio * np.exp(-half)), float(ratio * np.exp(half)), a.size)


def percentiles(value: float, resampled: np.ndarray, count: int) -> Estimate:
    """Return an estimate with the percentile interval of its resamples (resamples,), NaN left out."""
    low, high = np.nanquantile(resampled, TAILS)
    return Estimate(float(value), float(low), float(high), count)


def bca(
    samples: Sequence[ArrayLike], statistic: Callable[..., Array], resamples: int = 10_000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Return a statistic with its bias-corrected and accelerated bootstrap interval.

    Samples are drawn again each on its own, as strata are; those of one array (..., count) together.

    The statistic is vectorized over all but the samples' last axis and may add axes in front. Value, lower
    and upper end are of its shape; both ends are NaN where it never varies.
    """
    data = [numbers("samples", one) for one in samples]
    if not data or any(one.ndim == 0 or one.shape[-1] < 2 for one in data):
        raise ValueError("samples: expected arrays with at least two samples along the last axis")
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            data,
            lambda *parts, axis: statistic(*parts),
            vectorized=True,
            axis=-1,
            n_resamples=count("resamples", resamples),
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return np.asarray(statistic(*data)), np.asarray(interval.low), np.asarray(interval.high)


def variance_ratio(first: float, first_count: int, second: float, second_count: int) -> Estimate:
    """Estimate a ratio of variances of normal samples, with the exact interval."""
    _variances(first, first_count, second, second_count)
    ratio = first / second
    high, low = ratio / stats.f.ppf(TAILS, first_count - 1, second_count - 1)
    return Estimate(ratio, float(low), float(high), first_count + second_count)


def mean_difference(*moments: float) -> Estimate:
    """Estimate the first mean minus the second, with Welch's interval.

    Moments are the first sample's mean, variance and count, then the second's.
    """
    gap, error, degrees = _gap(*moments)
    return around(gap, float(stats.t.ppf(TAILS[1], degrees)) * error, int(moments[2] + moments[5]))


def proportion_difference(first: float, first_count: int, second: float, second_count: int) -> Estimate:
    """Estimate the first proportion minus the second, from events, with Newcombe's interval."""
    events = first, first_count, second, second_count
    _events(*events)
    low, high = confint_proportions_2indep(*events, method="newcomb", alpha=1 - CONFIDENCE)
    gap = first / first_count - second / second_count
    return Estimate(gap, float(low), float(high), first_count + second_count)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of estimates, with the mean of their intervals.

    Right for estimates that err together, and on the safe side for independent ones. Intervals of
    proportions stay honest at 0 and 1 in this way, where a bootstrap has nothing to say.
    """
    if not estimates:
        raise ValueError("estimates: expected at least one")
    value, low, high = np.mean([(one.value, one.low, one.high) for one in estimates], axis=0).tolist()
    return Estimate(value, low, high, sum(one.count for one in estimates))


@dataclass(frozen=True)
class Tested:
    """What a test found.

    `critical` is what the statistic is compared with at 5%, for two-sided tests the upper end; `degrees`
    of freedom, of F those of the numerator, are NaN where there are none.
    """

    statistic: float
    critical: float
    p: float
    degrees: float = float("nan")


def f_test(first: float, first_count: int, second: float, second_count: int) -> Tested:
    """Test two-sided that two normal samples have one variance; `critical` is the 0.975 quantile of F."""
    ratio = variance_ratio(first, first_count, second, second_count).value
    law = stats.f(first_count - 1, second_count - 1)
    p = min(1.0, 2 * min(law.cdf(ratio), law.sf(ratio)))
    return Tested(ratio, float(law.ppf(TAILS[1])), float(p), first_count - 1)


def welch(*moments: float) -> Tested:
    """Test two-sided that two means, first minus second, are equal, by Welch's t.

    Moments are those of `mean_difference`.
    """
    _, _, degrees = _gap(*moments)
    first, other = ((one, np.sqrt(spread), n) for one, spread, n in (moments[:3], moments[3:]))
    found = stats.ttest_ind_from_stats(*first, *other, equal_var=False)
    critical = float(stats.t.ppf(TAILS[1], degrees))
    return Tested(float(found.statistic), critical, float(found.pvalue), degrees)


def equivalence(*moments: float, margin: float) -> Tested:
    """Test that two means differ by less than a margin: two one-sided Welch tests (Schuirmann 1987).

    `statistic` is the smaller of the two; both must exceed `critical`. `p` is the larger of the two.
    """
    gap, error, degrees = _gap(*moments)
    statistic, law = (number("margin", margin, above=0) - abs(gap)) / error, stats.t(degrees)
    return Tested(statistic, float(law.ppf(CONFIDENCE)), float(law.sf(statistic)), degrees)


def smallest_margin(*moments: float) -> float:
    """Return the margin from which on `equivalence` says at 5% that two means are equivalent."""
    gap, error, degrees = _gap(*moments)
    return abs(gap) + error * float(stats.t.ppf(CONFIDENCE, degrees))


def _gap(*moments: float) -> tuple[float, float, float]:
    """Return the first mean minus the second, its standard error, and Welch's degrees of freedom."""
    first, first_variance, first_count, second, second_variance, second_count = moments
    gap = number("first_mean", first) - number("second_mean", second)
    _variances(first_variance, first_count, second_variance, second_count)
    parts = np.array([first_variance / first_count, second_variance / second_count])
    degrees = parts.sum() ** 2 / (parts**2 / [first_count - 1, second_count - 1]).sum()
    return gap, float(np.sqrt(parts.sum())), float(degrees)


def two_proportions(first: float, first_count: int, second: float, second_count: int) -> Tested:
    """Test one-sided that the first proportion is larger, by the z test with a pooled error.

    Events need not be whole, for printed proportions are rounded.
    """
    _events(first, first_count, second, second_count)
    critical = float(stats.norm.ppf(CONFIDENCE))
    if first + second in (0, first_count + second_count):
        return Tested(0.0, critical, 0.5)  # nothing varies, nothing can be told
    z, p = proportions_ztest([first, second], [first_count, second_count], alternative="larger")
    return Tested(float(z), critical, float(p))


def boschloo(first: int, first_count: int, second: int, second_count: int) -> float:
    """Return the p-value of Boschloo's exact test that the first proportion is larger."""
    _events(first, first_count, second, second_count)
    first, second = count("first", first, least=0), count("second", second, least=0)
    if first + second in (0, first_count + second_count):
        return 1.0
    table = [[first, second], [first_count - first, second_count - second]]
    return float(stats.boschloo_exact(table, alternative="greater").pvalue)


def permuted_variance_ratio(
    first: ArrayLike, second: ArrayLike, permutations: int = 9_999, seed: int = 0
) -> Tested:
    """Test two-sided that two samples spread alike, by permuting deviations from their own medians.

    The statistic is the absolute logarithm of the ratio of mean squared deviations; `critical` is its
    0.95 quantile under permutation. It needs no normality; exact only where the medians are known.
    """
    deviations = [one - np.median(one) for one in (checked("first", first), checked("second", second))]
    if not all(one.any() for one in deviations):
        raise ValueError(f"first, second: {_NO_SPREAD}")

    def ratio(one: Array, other: Array, axis: int) -> Array:
        return np.abs(np.log((one**2).mean(axis=axis) / (other**2).mean(axis=axis)))

    found = stats.permutation_test(
        deviations,
        ratio,
        vectorized=True,
        n_resamples=count("permutations", permutations),
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    critical = np.quantile(found.null_distribution, CONFIDENCE)
    return Tested(float(found.statistic), float(critical), float(found.pvalue))


def brown_forsythe(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> float:
    """Return the p-value of Brown and Forsythe's test that two methods spread alike.

    It is about total variances, with whatever noise is in them, and takes the methods to be independent:
    where policies of both share random numbers, it is conservative. Of two values on each side it is 1:
    two values are always as far from their median.

    Each method is given as a vector of values for each stack, whose deviations are from its own median.
    """
    if not (len(first) and len(second)):
        raise ValueError("first, second: expected at least one stack of each")
    sides = [
        np.concatenate([_deviations(checked("values", one)) for one in side]) for side in (first, second)
    ]
    if all(one.size == 2 and one.any() for one in sides):
        return 1.0
    if all(np.ptp(one) == 0 for one in sides):
        raise ValueError(f"first, second: {_NO_SPREAD}")
    return float(stats.f_oneway(*sides).pvalue)


def paired_brown_forsythe(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of the same question for pairs: a t test of the differences of deviations.

    Of equal deviations it is 1, and of two pairs: two values are always as far from their median.
    """
    a, b = (_deviations(one) for one in _pairs("first", first, "second", second))
    if a.size == 2 or (a == b).all():
        return 1.0
    if np.ptp(a - b) == 0:
        raise ValueError("first, second: deviations differ by the same everywhere; nothing to test")
    return float(stats.ttest_rel(a, b).pvalue)


def _deviations(values: Array) -> Array:
    return np.abs(values - np.median(values))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values."""
    # not by statsmodels, which collects garbage at every call: a second where models are in memory
    p_values = numbers("p_values", p_values, axes=1, at_least=0, at_most=1)
    order = np.argsort(p_values)
    stepped = p_values[order] * np.arange(p_values.size, 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def checked(name: str, samples: ArrayLike) -> Array:
    """Return samples as a vector of at least two finite numbers, or raise ValueError."""
    return numbers(name, samples, axes=1, least=2)


def _pairs(name: str, first: ArrayLike, other: str, second: ArrayLike) -> tuple[Array, Array]:
    a, b = checked(name, first), checked(other, second)
    if a.size != b.size:
        raise ValueError(f"{other}: expected {a.size} samples as in {name}, got {b.size}")
    return a, b


def _variances(first: float, first_count: float, second: float, second_count: float) -> None:
    for name, value, samples in (("first", first, first_count), ("second", second, second_count)):
        number(name, value, above=0)
        count(f"{name}_count", samples, least=2)


def _events(first: float, first_count: int, second: float, second_count: int) -> None:
    for name, events, trials in (("first", first, first_count), ("second", second, second_count)):
        number(name, events, at_least=0, at_most=count(f"{name}_count", trials))
