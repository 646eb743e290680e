"""Is an ensemble's variance right? Calibration, coverage, rank correlation, and how members disagree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_expit
from scipy.stats import chi2, norm

from vaalign_lib.statistics.arrays import Array, count, number, numbers
from vaalign_lib.statistics.tests import Estimate, proportion, spearman

LEVELS = (0.5, 0.8, 0.9, 0.95)
DROPPED = (0.0, 0.1, 0.2, 0.5)


def fit_temperature(errors: Array, variances: Array) -> float:
    """Return the factor on the standard deviations that makes normal errors likeliest.

    The likelihood of errors N(0, T^2 variance) is largest at T^2 = mean(error^2 / variance).
    """
    errors, variances = _checked(errors, variances)
    return float(np.sqrt((errors**2 / variances).mean()))


def error_by_deviation(errors: Array, variances: Array, bins: int = 8) -> pd.DataFrame:
    """Return a row per bin of equal count, by variance, of at least one error: `predicted` (root of the mean
    variance), `error` (root mean square) with `low` and `high` (95%, normal errors), `count`.
    """
    errors, variances = _checked(errors, variances)
    order = np.argsort(variances, kind="stable")
    rows = []
    for members in np.array_split(order, min(count("bins", bins), errors.size)):
        total = float((errors[members] ** 2).sum())
        squares = [total / one for one in (len(members), *chi2.ppf((0.975, 0.025), len(members)))]
        rows.append([variances[members].mean(), *squares, len(members)])
    table = pd.DataFrame(rows, columns=["predicted", "error", "low", "high", "count"])
    return np.sqrt(table.drop(columns="count")).assign(count=table["count"])


def coverage(errors: Array, variances: Array, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """Return how often normal intervals of the predicted deviation hold the error, a row per level:
    `nominal`, `actual` with `low` and `high` (95%).
    """
    errors, variances = _checked(errors, variances)
    rows = []
    for level in levels:
        number("levels", level, above=0, below=1)
        held = proportion(np.abs(errors) <= norm.ppf(0.5 + level / 2) * np.sqrt(variances))
        rows.append([level, held.value, held.low, held.high])
    return pd.DataFrame(rows, columns=["nominal", "actual", "low", "high"])


def rank_correlation(errors: Array, variances: Array) -> Estimate:
    """Return Spearman's correlation of squared error and variance."""
    errors, variances = _checked(errors, variances)
    return spearman(errors**2, variances)


def accuracy_after_dropping(
    correct: NDArray[np.bool_], variances: Array, shares: Sequence[float] = DROPPED
) -> pd.DataFrame:
    """Return the share of pairs ranked correctly once the most uncertain are left out, a row per share:
    `dropped`, `accuracy` with `low` and `high` (95%), `count`.
    """
    correct, variances = np.asarray(correct), numbers("variances", variances, axes=1, at_least=0)
    _check_alike(correct=correct, variances=variances)
    order = np.argsort(variances, kind="stable")
    rows = []
    for share in shares:
        number("shares", share, at_least=0, below=1)
        kept = proportion(correct[order[: len(order) - int(share * len(order))]])
        rows.append([share, kept.value, kept.low, kept.high, kept.count])
    return pd.DataFrame(rows, columns=["dropped", "accuracy", "low", "high", "count"])


# --- labels alone -----------------------------------------------------------------------------------


def label_loss(gaps: Array, variances: Array, temperature: float) -> float:
    """Return the mean negative log-likelihood of labels, all in favour of the chosen response.

    MacKay's approximation of E[sigmoid(gap + T sqrt(variance) z)]: the sigmoid of the gap over
    sqrt(1 + pi T^2 variance / 8).
    """
    shrunk = gaps / np.sqrt(1 + np.pi * temperature**2 * variances / 8)
    return float(-log_expit(shrunk).mean())


def fit_temperature_to_labels(gaps: Array, variances: Array) -> float:
    """Return the factor on the standard deviations, from 1e-3 to 1e3, that makes the labels of pairs
    likeliest, from the gaps of the mean reward, chosen minus rejected, and their variances (pairs,).
    """
    gaps, variances = _checked(gaps, variances)

    def loss(logarithm: float) -> float:
        return label_loss(gaps, variances, np.exp(logarithm))

    return float(np.exp(minimize_scalar(loss, bounds=np.log([1e-3, 1e3]), method="bounded").x))


# --- disagreement -----------------------------------------------------------------------------------


def sample_variance(scores: Array) -> Array:
    """Return the sample variance over models of scores (responses, models): (responses,), ddof=1."""
    if np.ndim(scores) != 2 or np.shape(scores)[1] < 2:
        raise ValueError(f"scores: expected (responses, at least two models), got {np.shape(scores)}")
    return np.asarray(np.var(scores, axis=1, ddof=1))


def difference_ratio(chosen: Array, rejected: Array) -> Array:
    """Return Var(chosen - rejected) / (Var(chosen) + Var(rejected)) over models, from scores (pairs,
    models): (pairs,). It is 0 for models that are shifted copies of each other, 1 on average for unrelated
    scores, and up to 2 for models that trade one response against the other.
    """
    _check_alike(chosen=chosen, rejected=rejected)
    apart = sample_variance(chosen) + sample_variance(rejected)
    return np.asarray(sample_variance(chosen - rejected) / apart)


def initial_share(initial: Array, final: Array) -> Array:
    """Return the squared correlation over models of scores (responses, models) before and after training
    (responses,): 1 if training moved all models alike, 1 / (models - 1) on average if it left no trace.
    """
    _check_alike(initial=initial, final=final)
    before = initial - initial.mean(1, keepdims=True)
    after = final - final.mean(1, keepdims=True)
    product = (before * after).sum(1) ** 2
    return np.asarray(product / ((before**2).sum(1) * (after**2).sum(1)))


def between_ensembles(scores: Array) -> tuple[Array, Array]:
    """Return what independent ensembles say about themselves, and how they in fact differ, from scores
    (ensembles, members, responses): the members' sample variance, averaged over ensembles, and the sample
    variance over ensembles of their mean reward, (responses,) each.
    """
    if scores.ndim != 3 or min(scores.shape[:2]) < 2:
        raise ValueError(f"scores: expected (at least two ensembles, two members, any), got {scores.shape}")
    return np.asarray(scores.var(1, ddof=1).mean(0)), np.asarray(scores.mean(1).var(0, ddof=1))


def _checked(errors: Array, variances: Array) -> tuple[Array, Array]:
    errors = numbers("errors", errors, axes=1, least=5)
    variances = numbers("variances", variances, axes=1, above=0)
    _check_alike(errors=errors, variances=variances)
    return errors, variances


def _check_alike(**arrays: NDArray[Any]) -> None:
    first, second = (np.shape(one) for one in arrays.values())
    if first != second:
        raise ValueError(f"{', '.join(arrays)}: expected one shape, got {first} and {second}")
