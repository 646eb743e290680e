"""Are the variances right? Errors beside what the variances say about them.

Everything takes errors (n,) and variances (n,), whatever the errors are measured against. Two readings
are kept apart: errors against the true reward, which contain the bias that all members share; and the
spread of ensembles trained independently of each other, which is what the theory speaks of.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import chi2, norm, spearmanr

from vaalign_lib.arrays import Array, count, number, numbers
from vaalign_lib.statistics import CONFIDENCE, Estimate, proportion

LEVELS = (0.5, 0.8, 0.9, 0.95)
DROPPED = (0.0, 0.1, 0.2, 0.5)


def fit_temperature(errors: Array, variances: Array) -> float:
    """Return the factor on the standard deviations that makes normal errors likeliest.

    The likelihood of errors N(0, T^2 variance) is largest at T^2 = mean(error^2 / variance).
    """
    errors, variances = _checked(errors, variances)
    return float(np.sqrt((errors**2 / variances).mean()))


def error_by_deviation(errors: Array, variances: Array, bins: int = 8) -> pd.DataFrame:
    """Compare errors with predicted standard deviations in bins of equal count.

    Where there are fewer errors than bins, each has a bin of its own.

    Returns:
        A row per bin: `predicted` (root of the mean variance), `error` (root mean square) with `low`
        and `high` (95%, normal errors), `count`.
    """
    errors, variances = _checked(errors, variances)
    rows = []
    bins = min(count("bins", bins), errors.size)
    for members in np.array_split(np.argsort(variances, kind="stable"), bins):
        size, total = len(members), float((errors[members] ** 2).sum())
        low, high = (total / chi2.ppf(p, size) for p in (0.975, 0.025))
        rows.append(
            {
                "predicted": np.sqrt(variances[members].mean()),
                "error": np.sqrt(total / size),
                "low": np.sqrt(low),
                "high": np.sqrt(high),
                "count": size,
            }
        )
    return pd.DataFrame(rows)


def coverage(errors: Array, variances: Array, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """Return how often normal intervals of the predicted deviation hold the error.

    Returns:
        A row per level: `nominal`, `actual` with `low` and `high` (95%).
    """
    errors, variances = _checked(errors, variances)
    rows = []
    for level in levels:
        number("levels", level, above=0, below=1)
        held = proportion(np.abs(errors) <= norm.ppf(0.5 + level / 2) * np.sqrt(variances))
        rows.append({"nominal": level, "actual": held.value, "low": held.low, "high": held.high})
    return pd.DataFrame(rows)


def rank_correlation(errors: Array, variances: Array, confidence: float = CONFIDENCE) -> Estimate:
    """Return Spearman's correlation of squared error and variance.

    The interval is Fisher's with the variance (1 + r^2 / 2) / (n - 3) of Bonett and Wright (2000).
    """
    errors, variances = _checked(errors, variances)
    r = float(spearmanr(errors**2, variances).statistic)
    half = norm.ppf(0.5 + confidence / 2) * np.sqrt((1 + r**2 / 2) / (errors.size - 3))
    low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
    return Estimate(r, float(low), float(high), errors.size)


def accuracy_after_dropping(
    correct: NDArray[np.bool_], variances: Array, shares: Sequence[float] = DROPPED
) -> pd.DataFrame:
    """Return the share of pairs ranked correctly once the most uncertain are left out.

    Returns:
        A row per share dropped: `dropped`, `accuracy` with `low` and `high` (95%), `count`.
    """
    correct, variances = np.asarray(correct), numbers("variances", variances, axes=1, at_least=0)
    if correct.shape != variances.shape:
        raise ValueError(
            f"correct, variances: expected as many of each, got {correct.size} and {variances.size}"
        )
    order = np.argsort(variances, kind="stable")
    rows = []
    for share in shares:
        number("shares", share, at_least=0, below=1)
        kept = proportion(correct[order[: len(order) - int(share * len(order))]])
        rows.append(
            {
                "dropped": share,
                "accuracy": kept.value,
                "low": kept.low,
                "high": kept.high,
                "count": kept.count,
            }
        )
    return pd.DataFrame(rows)


# --- labels alone -----------------------------------------------------------------------------------


def label_probability(gaps: Array, variances: Array, temperature: float) -> Array:
    """Return P(chosen is preferred) under normal uncertainty about the gap.

    MacKay's approximation of E[sigmoid(gap + T sqrt(variance) z)]: the gap over
    sqrt(1 + pi T^2 variance / 8).
    """
    return np.asarray(expit(gaps / np.sqrt(1 + np.pi * temperature**2 * variances / 8)))


def label_loss(gaps: Array, variances: Array, temperature: float) -> float:
    """Return the mean negative log-likelihood of labels, all in favour of the chosen response."""
    shrunk = gaps / np.sqrt(1 + np.pi * temperature**2 * variances / 8)
    return float(-log_expit(shrunk).mean())


def fit_temperature_to_labels(gaps: Array, variances: Array, highest: float = 1e3) -> float:
    """Return the factor on the standard deviations that makes the labels of pairs likeliest.

    Args:
        gaps: mean reward of the chosen minus that of the rejected response (pairs,).
        variances: of the gap (pairs,).
        highest: end of the search, which runs over the factor's logarithm.
    """
    gaps, variances = _checked(gaps, variances)
    found = minimize_scalar(
        lambda log: label_loss(gaps, variances, np.exp(log)),
        bounds=(np.log(1e-3), np.log(highest)),
        method="bounded",
    )
    return float(np.exp(found.x))


def _checked(errors: Array, variances: Array) -> tuple[Array, Array]:
    errors = numbers("errors", errors, axes=1, least=5)
    variances = numbers("variances", variances, axes=1, above=0)
    if errors.size != variances.size:
        raise ValueError(
            f"errors, variances: expected as many of each, got {errors.size} and {variances.size}"
        )
    return errors, variances
