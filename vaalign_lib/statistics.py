"""Estimates with intervals, from scipy and statsmodels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, f_oneway, norm, ttest_rel
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number, its confidence interval, and how many samples it rests on."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def rounded(value: Any, digits: int) -> Any:
    """Return a finite float with so many significant digits, and anything else as it is."""
    if isinstance(value, float) and np.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value


def proportion(events: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a probability from independent events (count,), with Clopper-Pearson's interval."""
    happened = np.asarray(events, dtype=bool)
    if happened.ndim != 1 or not happened.size:
        raise ValueError(f"events: expected a non-empty vector, got shape {happened.shape}")
    successes, count = int(happened.sum()), happened.size
    low, high = proportion_confint(successes, count, alpha=1 - confidence, method="beta")
    return Estimate(successes / count, float(low), float(high), count)


def mean(samples: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a mean from independent samples (count,), with the normal interval."""
    values = _samples("samples", samples)
    half = norm.ppf(0.5 + confidence / 2) * values.std(ddof=1) / np.sqrt(values.size)
    centre = values.mean()
    return Estimate(float(centre), float(centre - half), float(centre + half), values.size)


def median(samples: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a median from independent samples (count,), with the order-statistics interval."""
    values = np.sort(_samples("samples", samples))
    low = int(binom.ppf(0.5 - confidence / 2, values.size, 0.5))  # P(fewer than low below) < 2.5%
    if low < 1:
        raise ValueError(f"samples: {values.size} are too few for a {confidence:.0%} interval")
    ends = float(values[low - 1]), float(values[values.size - low])
    return Estimate(float(np.median(values)), *ends, values.size)


def paired_variance_ratio(
    numerator: ArrayLike, denominator: ArrayLike, confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate Var(numerator) / Var(denominator) from paired samples (count,).

    The interval is that of the logarithm by the delta method: sample i moves it by
    (a_i - mean)^2 / Var(a) - (b_i - mean)^2 / Var(b), over the count. It needs no normality and
    allows for the pairing, but the count must be large.
    """
    a, b = _samples("numerator", numerator), _samples("denominator", denominator)
    if a.size != b.size:
        raise ValueError(
            f"denominator: expected {a.size} samples as in the numerator, got {b.size}"
        )
    variances = a.var(ddof=1), b.var(ddof=1)
    if min(variances) == 0:
        raise ValueError("numerator, denominator: all samples are equal, the ratio is undefined")
    influence = (a - a.mean()) ** 2 / variances[0] - (b - b.mean()) ** 2 / variances[1]
    half = norm.ppf(0.5 + confidence / 2) * influence.std(ddof=1) / np.sqrt(a.size)
    ratio = variances[0] / variances[1]
    return Estimate(float(ratio), float(ratio * np.exp(-half)), float(ratio * np.exp(half)), a.size)


# --- returns of trained policies ----------------------------------------------------------------------


@dataclass(frozen=True)
class Returns:
    """The returns of one stack of policies.

    Attributes:
        values: of the policies (policies,).
        errors: their standard errors, from the evaluation alone (policies,).
    """

    values: np.ndarray
    errors: np.ndarray

    def __post_init__(self) -> None:
        _samples("values", self.values)
        if self.errors.shape != self.values.shape or not (self.errors >= 0).all():
            raise ValueError(
                f"errors: expected {self.values.size} numbers of at least 0, got {self.errors!r}"
            )

    @property
    def total(self) -> float:
        """The sample variance over policies."""
        return float(self.values.var(ddof=1))

    @property
    def noise(self) -> float:
        """The part of it that the evaluation makes."""
        return float((self.errors**2).mean())

    @property
    def training(self) -> float:
        """The rest, which training makes; an estimate, negative if there is only noise."""
        return self.total - self.noise


@dataclass(frozen=True)
class Ratio(Estimate):
    """A ratio of training variances with its bootstrap.

    Attributes:
        resampled: the ratio in every resample (resamples,); NaN where one policy was all that was drawn.
        floored: share of resamples in which a training variance did not stand out from the noise.
    """

    resampled: np.ndarray
    floored: float

    FLOORED: ClassVar[float] = (
        1 - CONFIDENCE
    ) / 2  # from here on the floor has a say in the interval

    @property
    def measurable(self) -> bool:
        """Whether the floor has no say in the interval."""
        return self.floored < self.FLOORED

    def __str__(self) -> str:
        note = (
            "" if self.measurable else f"; not above the noise in {self.floored:.0%} of resamples"
        )
        return super().__str__() + note


def training_variance_ratio(
    numerator: Sequence[Returns], denominator: Sequence[Returns], rows: Sequence[np.ndarray]
) -> Ratio:
    """Estimate a ratio of training variances, with a percentile bootstrap over policies.

    Stacks come in pairs whose policies share their random numbers, so they are drawn again together;
    variances are pooled over stacks. A training variance counts as at least a hundredth of the total.

    Args:
        numerator: one or more stacks of one method.
        denominator: as many of the other.
        rows: for each pair the policies of every resample (resamples, policies).
    """
    pairs = list(zip(numerator, denominator, rows, strict=True))
    if not pairs or any(not a.values.size == b.values.size == r.shape[1] for a, b, r in pairs):
        raise ValueError("expected pairs of stacks of the same size, at least one")
    whole, resampled, floored = [], [], np.zeros(len(rows[0]), dtype=bool)
    for stacks in ([a for a, *_ in pairs], [b for _, b, _ in pairs]):
        whole.append(max(sum(s.training for s in stacks), sum(s.total / 100 for s in stacks)))
        parts = [_resampled(one, drawn) for one, drawn in zip(stacks, rows, strict=True)]
        variances, lowest = (np.sum(list(kind), axis=0) for kind in zip(*parts, strict=True))
        resampled.append(np.where(lowest > 0, np.maximum(variances, lowest), np.nan))
        floored |= variances <= lowest
    ratios = resampled[0] / resampled[1]
    found = percentiles(whole[0] / whole[1], ratios, sum(a.values.size for a, *_ in pairs))
    return Ratio(found.value, found.low, found.high, found.count, ratios, float(floored.mean()))


def _resampled(returns: Returns, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the training variance of every resample, and the least that it counts as (resamples,).

    A resample's variance is on average (n - 1) / n of the sample's; that is made good.
    """
    count = returns.values.size
    total = returns.values[rows].var(axis=-1, ddof=1) * count / (count - 1)
    return total - (returns.errors[rows] ** 2).mean(axis=-1), total / 100


def percentiles(
    value: float, resampled: np.ndarray, count: int, confidence: float = CONFIDENCE
) -> Estimate:
    """Return an estimate with the percentile interval of its resamples; NaN among them are left out."""
    low, high = np.nanquantile(resampled, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Estimate(float(value), float(low), float(high), count)


def brown_forsythe(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> float:
    """Return the p-value of Brown and Forsythe's test that two methods spread alike.

    It is about total variances, with whatever noise is in them, and takes the methods to be independent:
    where policies of both share random numbers, it is conservative.

    Args:
        first: values of one method, a vector for each stack; deviations are taken from its median.
        second: of the other.
    """
    sides = []
    for stacks in (first, second):
        vectors = [_samples("values", stack) for stack in stacks]
        sides.append(np.concatenate([np.abs(one - np.median(one)) for one in vectors]))
    return float(f_oneway(*sides).pvalue)


def paired_brown_forsythe(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of the same question for pairs: a t test of the differences of deviations."""
    a, b = _samples("first", first), _samples("second", second)
    return float(ttest_rel(np.abs(a - np.median(a)), np.abs(b - np.median(b))).pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values."""
    return np.asarray(multipletests(np.asarray(p_values, dtype=float), method="holm")[1])


def risk(returns: ArrayLike, reference: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate the probability that a policy returns no more than the reference does.

    The bar is the mean of evaluations of the reference; the interval is Clopper and Pearson's with the
    bar moved by its own error against it.

    Args:
        returns: of policies.
        reference: evaluations of the reference policy.
        confidence: of the interval.
    """
    values, bar = _samples("returns", returns), mean(reference, confidence)
    low = proportion(values <= bar.low, confidence).low
    high = proportion(values <= bar.high, confidence).high
    return Estimate(float((values <= bar.value).mean()), low, high, values.size)


def _samples(name: str, samples: ArrayLike) -> np.ndarray:
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(
            f"{name}: expected a vector of at least two samples, got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: must be finite, got NaN or infinity")
    return values
