"""Estimates with intervals, from scipy and statsmodels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, norm
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


def _samples(name: str, samples: ArrayLike) -> np.ndarray:
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(
            f"{name}: expected a vector of at least two samples, got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: must be finite, got NaN or infinity")
    return values
