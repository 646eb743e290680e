"""The probability bounds of Theorem 2.2 and the risk formulas of Theorem 2.4.

n = |X||Y| counts the arms, Phi is the standard normal distribution function, F_n that of chi-square
with n degrees of freedom. Arrays carry arms on the last axis and broadcast over the others.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2, norm

from vaalign_lib.tabular import Array

# --- Theorem 2.2 ----------------------------------------------------------------------------------


def printed_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return 1 - exp(-n / beta^2), the probability that Theorem 2.2 prints."""
    return -np.expm1(-np.asarray(arms, dtype=float) / np.asarray(beta, dtype=float) ** 2)


def proof_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return 1 - exp(-beta^2 / n): the proof's beta = sqrt(n ln(1 / delta)) solved for 1 - delta."""
    return -np.expm1(-(np.asarray(beta, dtype=float) ** 2) / np.asarray(arms, dtype=float))


def lower_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return F_n(beta^2), the sharp lower bound on Theorem 2.2's probability, attained at r* = 0.

    It is the probability that ||R-hat - r*|| <= beta in the norm of Sigma^-1, which by
    Cauchy-Schwarz implies the inequality for every d.
    """
    return chi2.cdf(np.asarray(beta, dtype=float) ** 2, np.asarray(arms, dtype=float))


def upper_bound(beta: ArrayLike) -> Array:
    """Return Phi(beta), the sharp upper bound, approached when all |r*| / sigma are large.

    The event says that R-hat lies within beta of the l1 ball of radius ||r*||_1, and that ball lies
    in the half-space {x: sign(r*)' x <= ||r*||_1}, on whose boundary r* lies.
    """
    return norm.cdf(np.asarray(beta, dtype=float))


def box_supremum(estimates: ArrayLike, variances: ArrayLike, beta: ArrayLike) -> Array:
    """Return sup of R-hat' d - beta ||d||_Sigma over d in [-2, 2]^n, Equation (1).

    Shapes: estimates and variances (..., arms), beta (...) -> (...).
    """
    best = box_maximizer(estimates, variances, beta)
    length = np.sqrt((np.asarray(variances) * best**2).sum(-1))
    return (np.asarray(estimates) * best).sum(-1) - np.asarray(beta) * length


def box_maximizer(estimates: ArrayLike, variances: ArrayLike, beta: ArrayLike) -> Array:
    """Return the d in [-2, 2]^n that maximizes R-hat' d - beta ||d||_Sigma, Equation (1).

    In s = sigma |d| and a = |R-hat| / sigma the solution is s_i = min(2 sigma_i, a_i t), where t > 0
    solves sum_i s_i^2 = beta^2 t^2. The left side minus the right is concave in t^2 and piecewise
    linear, so one pass over the sorted ratios 2 sigma_i / a_i finds the piece with the root. If
    ||a|| <= beta the maximizer is 0: the penalty outweighs every direction.

    Shapes: estimates and variances (..., arms), beta (...), at least 0 -> (..., arms).
    """
    beta = np.asarray(beta, dtype=float)
    variances = np.asarray(variances, dtype=float)
    if not (np.isfinite(beta) & (beta >= 0)).all():
        raise ValueError("beta: must be finite and at least 0")
    if not (np.isfinite(variances) & (variances > 0)).all():
        raise ValueError("variances: must be positive and finite")
    estimates, variances = np.broadcast_arrays(np.asarray(estimates, dtype=float), variances)
    if not np.isfinite(estimates).all():
        raise ValueError("estimates: must be finite, got NaN or infinity")
    scaled, cap = np.abs(estimates) / np.sqrt(variances), 2 * np.sqrt(variances)
    limit = _box_scale(scaled, cap, beta)
    length = np.minimum(cap, scaled * np.where(np.isfinite(limit), limit, 0.0)[..., None])
    length = np.where(np.isinf(limit)[..., None] & (scaled > 0), cap, length)
    return np.sign(estimates) * length / np.sqrt(variances)


def _box_scale(scaled: Array, cap: Array, beta: Array) -> Array:
    """Solve sum_i min(cap_i, scaled_i t)^2 = beta^2 t^2 for t > 0; 0 if none, inf if beta is 0."""
    with np.errstate(divide="ignore"):
        knots = np.where(scaled > 0, (cap / scaled) ** 2, np.inf)
    order = np.argsort(knots, axis=-1)
    knots = np.take_along_axis(knots, order, -1)
    squares = np.take_along_axis(scaled**2, order, -1)
    capped = np.cumsum(np.take_along_axis(cap**2, order, -1), axis=-1)
    free = squares.sum(-1, keepdims=True) - np.cumsum(squares, axis=-1)
    # after the k-th knot u = t^2 the function is capped_k - (beta^2 - free_k) u
    slope = beta[..., None] ** 2 - np.maximum(free, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.where(slope > 0, capped / slope, np.inf)
    upper = np.concatenate([knots[..., 1:], np.full_like(knots[..., :1], np.inf)], axis=-1)
    first = np.argmax(root <= upper, axis=-1)[..., None]
    solution = np.sqrt(np.take_along_axis(root, first, -1)[..., 0])
    return np.where((scaled**2).sum(-1) <= beta**2, 0.0, solution)


def box_departures(estimates: ArrayLike, variances: ArrayLike) -> Array:
    """Return the beta at which every arm leaves the corner |d_i| = 2 of Equation (1)'s solution.

    Arm i is at its corner while a_i t >= 2 sigma_i, that is t >= t_i = 2 sigma_i^2 / |R-hat_i|, and t
    falls as beta grows: beta_i = sqrt(sum_j min(2 sigma_j, a_j t_i)^2) / t_i. So arms leave in the
    order of |R-hat| / sigma^2. Shapes: (arms,) -> (arms,).
    """
    estimates, variances = np.abs(np.asarray(estimates, dtype=float)), np.asarray(variances)
    scaled, cap = estimates / np.sqrt(variances), 2 * np.sqrt(variances)
    leaving = (cap / scaled)[:, None]
    return np.sqrt((np.minimum(cap, scaled * leaving) ** 2).sum(-1)) / leaving[:, 0]


def lower_bound_event(
    estimates: ArrayLike, true_rewards: ArrayLike, variances: ArrayLike, beta: ArrayLike
) -> np.ndarray:
    """Return whether the inequality of Theorem 2.2 holds: box_supremum <= sup r*' d = 2 ||r*||_1.

    Shapes: estimates, true_rewards, variances (..., arms), beta (...) -> bool (...).
    """
    truth = 2 * np.abs(np.asarray(true_rewards, dtype=float)).sum(-1)
    return box_supremum(estimates, variances, beta) <= truth


# --- Theorem 2.4 ----------------------------------------------------------------------------------


def vanilla_risk(
    true_rewards: ArrayLike,
    variances: ArrayLike,
    form: Literal["free", "sum_to_one"] = "free",
) -> Array:
    """Return P(pi_1' r* <= pi_0' r*) of Equation (2)'s policy under Assumption 2.1.

    `free`: Phi(-||r*||^2 / sqrt(r*' Sigma r*)), as printed in Appendix A. `sum_to_one`: the same with
    r* less its mean over the arms. Neither depends on epsilon.

    Shapes: true_rewards and variances (..., arms) -> (...).
    """
    rewards, variances = (
        np.asarray(true_rewards, dtype=float),
        np.asarray(variances, dtype=float),
    )
    if form == "sum_to_one":
        rewards = rewards - rewards.mean(-1, keepdims=True)
    return _risk((rewards**2).sum(-1), np.sqrt((variances * rewards**2).sum(-1)))


def variance_aware_risk(
    true_rewards: ArrayLike,
    variances: ArrayLike,
    form: Literal["free", "sum_to_one"] = "free",
) -> Array:
    """Return P(pi_2' r* <= pi_0' r*) of Equation (3)'s policy under Assumption 2.1.

    `free`: Phi(-sqrt(r*' Sigma^-1 r*)), as printed in Appendix A. `sum_to_one`: the same with r* less
    its precision-weighted mean over the arms. Shapes as in `vanilla_risk`.
    """
    rewards, variances = (
        np.asarray(true_rewards, dtype=float),
        np.asarray(variances, dtype=float),
    )
    if form == "sum_to_one":
        precision = 1 / variances
        centre = (precision * rewards).sum(-1, keepdims=True) / precision.sum(-1, keepdims=True)
        rewards = rewards - centre
    signal = np.sqrt((rewards**2 / variances).sum(-1))
    return _risk(signal, np.ones_like(signal))


def _risk(mean: Array, deviation: Array) -> Array:
    """Return P(N(mean, deviation^2) <= 0); without signal the policy never changes, so 1."""
    return np.where(
        deviation * mean > 0,
        norm.cdf(-np.divide(mean, deviation, out=np.zeros_like(mean), where=deviation > 0)),
        1.0,
    )


def interior_epsilon(reference: ArrayLike) -> Array:
    """Return n / (n - 1) min_y pi_0(y)^2: up to this epsilon no probability can reach zero.

    Within ||pi - pi_0||^2 <= epsilon and sum_y (pi - pi_0) = 0 a single coordinate moves by at most
    sqrt(epsilon (n - 1) / n). Up to there Theorem 2.4 holds on the simplex, since both policies are
    those of `sum_to_one` (Equation (3)'s region, of radius lambda_min(Sigma) epsilon, is contained).

    Shapes: reference (..., arms) -> (...).
    """
    reference = np.asarray(reference, dtype=float)
    arms = reference.shape[-1]
    if arms < 2:
        raise ValueError("reference: expected at least two arms")
    return arms / (arms - 1) * reference.min(-1) ** 2
