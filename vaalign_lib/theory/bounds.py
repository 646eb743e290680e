"""The probability bounds of Theorem 2.2 and the risk formulas of Theorem 2.4, of n = |X||Y| arms.

Rewards and variances are (..., arms), beta and what is returned of a problem (...); they broadcast.
Phi is the standard normal distribution function, F_n that of chi-square with n degrees of freedom.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2, norm

from vaalign_lib.statistics.arrays import Array, broadcast, number, numbers
from vaalign_lib.theory.tabular import distribution, problem, with_strength

RiskForm = Literal["free", "sum_to_one"]
RISK_FORMS: tuple[RiskForm, ...] = get_args(RiskForm)


def printed_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return 1 - exp(-n / beta^2), the probability that Theorem 2.2 prints; 1 at beta 0."""
    arms, squared = _sizes(arms, beta)
    with np.errstate(divide="ignore"):
        return -np.expm1(-arms / squared)


def proof_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return 1 - exp(-beta^2 / n): the proof's beta = sqrt(n ln(1 / delta)) solved for 1 - delta."""
    arms, squared = _sizes(arms, beta)
    return -np.expm1(-squared / arms)


def lower_bound(arms: ArrayLike, beta: ArrayLike) -> Array:
    """Return F_n(beta^2), the sharp lower bound on Theorem 2.2's probability, attained at r* = 0.

    It is the probability that ||R-hat - r*|| <= beta in the norm of Sigma^-1, which by
    Cauchy-Schwarz implies the inequality for every d.
    """
    arms, squared = _sizes(arms, beta)
    return chi2.cdf(squared, arms)


def upper_bound(beta: ArrayLike) -> Array:
    """Return Phi(beta), the sharp upper bound, approached when all |r*| / sigma are large.

    The event says that R-hat lies within beta of the l1 ball of radius ||r*||_1, and that ball lies
    in the half-space {x: sign(r*)' x <= ||r*||_1}, on whose boundary r* lies.
    """
    return norm.cdf(numbers("beta", beta, at_least=0))


def _sizes(arms: ArrayLike, beta: ArrayLike) -> tuple[Array, Array]:
    """Check; return n and beta^2."""
    arms, beta = numbers("arms", arms, at_least=1, whole=True), numbers("beta", beta, at_least=0)
    arms, beta = broadcast(arms=arms, beta=beta)
    with np.errstate(over="ignore"):
        return arms, beta**2


def box_supremum(estimates: ArrayLike, variances: ArrayLike, beta: ArrayLike) -> Array:
    """Return sup of R-hat' d - beta ||d||_Sigma over d in [-2, 2]^n (...), Equation (1)."""
    best = box_maximizer(estimates, variances, beta)
    estimates, variances = problem(estimates=estimates, variances=variances)
    length = np.sqrt((variances * best**2).sum(-1))
    return (estimates * best).sum(-1) - np.asarray(beta, dtype=float) * length


def box_maximizer(estimates: ArrayLike, variances: ArrayLike, beta: ArrayLike) -> Array:
    """Return the d in [-2, 2]^n that maximizes R-hat' d - beta ||d||_Sigma, Equation (1).

    In s = sigma |d| and a = |R-hat| / sigma the solution is s_i = min(2 sigma_i, a_i t), where t > 0
    solves sum_i s_i^2 = beta^2 t^2. The left side minus the right is concave in t^2 and piecewise
    linear, so one pass over the sorted ratios 2 sigma_i / a_i finds the piece with the root. If
    ||a|| <= beta the maximizer is 0: the penalty outweighs every direction.
    """
    checked = problem(estimates=estimates, variances=variances)
    estimates, variances, beta = with_strength(checked, "beta", beta, at_least=0)
    scaled, cap = np.abs(estimates) / np.sqrt(variances), 2 * np.sqrt(variances)
    size = _size(scaled)  # estimates and beta may be scaled together
    scaled, beta = scaled / size[..., None], beta / size
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
    order of |R-hat| / sigma^2, those with an estimate of 0 at once.
    """
    estimates, variances = problem(estimates=estimates, variances=variances)
    scaled, cap = np.abs(estimates) / np.sqrt(variances), 2 * np.sqrt(variances)
    with np.errstate(divide="ignore"):
        leaving = (cap / scaled)[..., None]
    moving = np.where(np.isfinite(leaving), leaving, 0.0)
    lengths = np.minimum(cap[..., None, :], scaled[..., None, :] * moving)
    return np.sqrt((lengths**2).sum(-1)) / leaving[..., 0]


def lower_bound_event(
    estimates: ArrayLike, true_rewards: ArrayLike, variances: ArrayLike, beta: ArrayLike
) -> np.ndarray:
    """Return whether the inequality of Theorem 2.2 holds (...): box_supremum <= sup r*' d = 2 ||r*||_1."""
    checked = problem(estimates=estimates, true_rewards=true_rewards, variances=variances)
    estimates, true_rewards, variances = checked
    return box_supremum(estimates, variances, beta) <= 2 * np.abs(true_rewards).sum(-1)


def vanilla_risk(true_rewards: ArrayLike, variances: ArrayLike, form: RiskForm = "free") -> Array:
    """Return P(pi_1' r* <= pi_0' r*) of Equation (2)'s policy under Assumption 2.1.

    `free`: Phi(-||r*||^2 / sqrt(r*' Sigma r*)), as printed in Appendix A. `sum_to_one`: the same with
    r* less its mean over the arms. Neither depends on epsilon. On the simplex there is no such formula;
    up to `interior_epsilon` the risk is that of `sum_to_one`.
    """
    signal = vanilla_signal(true_rewards, variances, form)
    return np.where(signal > 0, norm.cdf(-signal), 1.0)


def variance_aware_risk(true_rewards: ArrayLike, variances: ArrayLike, form: RiskForm = "free") -> Array:
    """Return P(pi_2' r* <= pi_0' r*) of Equation (3)'s policy under Assumption 2.1.

    `free`: Phi(-sqrt(r*' Sigma^-1 r*)), as printed in Appendix A. `sum_to_one`: the same with r* less
    its precision-weighted mean over the arms.
    """
    signal = variance_aware_signal(true_rewards, variances, form)
    return np.where(signal > 0, norm.cdf(-signal), 1.0)


def vanilla_signal(true_rewards: ArrayLike, variances: ArrayLike, form: RiskForm = "free") -> Array:
    """Return mean over deviation of r*' R-hat (...): `vanilla_risk` is Phi(-signal); 0 without any."""
    unit, size, variances = _risk_problem(true_rewards, variances, form, weighted=False)
    with np.errstate(invalid="ignore"):  # 0 / 0 without signal
        slope = (unit**2).sum(-1) / np.sqrt((variances * unit**2).sum(-1))
    return np.where(unit.any(-1), size * slope, 0.0)


def variance_aware_signal(true_rewards: ArrayLike, variances: ArrayLike, form: RiskForm = "free") -> Array:
    """Return mean over deviation of r*' Sigma^-1 R-hat (...), never below vanilla's (Cauchy-Schwarz)."""
    unit, size, variances = _risk_problem(true_rewards, variances, form, weighted=True)
    return size * np.sqrt((unit**2 / variances).sum(-1))


def normal_tails(gain: ArrayLike, signal: ArrayLike, level: float) -> tuple[Array, Array]:
    """Return CVaR at a level and the expected loss E[max(-G, 0)] of gains G ~ N(gain, (gain / signal)^2).

    Such are the gains of steps that are linear in the estimates, pi - pi_0 = t R-hat (vanilla) or
    t Sigma^-1 R-hat, as a quadratic penalty of fixed strength has them. At equal mean gain the step with
    the larger signal has the smaller variance, and of normal gains with one mean it dominates the other to
    second order: its CVaR is higher at every level, its expected loss lower. So Theorem 2.4 extends to both
    there. At the radii of Theorem 2.4 it does not, see `simulations.tail_counterexample`.
    """
    gain, signal = broadcast(gain=numbers("gain", gain), signal=numbers("signal", signal, above=0))
    number("level", level, above=0, at_most=1)
    hazard = norm.pdf(norm.ppf(level)) / level
    loss = norm.pdf(signal) - signal * norm.cdf(-signal)
    return gain * (1 - hazard / signal), gain / signal * loss


def _risk_problem(
    true_rewards: ArrayLike, variances: ArrayLike, form: str, *, weighted: bool
) -> tuple[Array, ...]:
    """Check; return rewards, less their mean if probabilities sum to one, as units and size, and variances.

    Rewards that are equal but for rounding leave exactly zero: without signal the policy never moves.
    """
    if form not in RISK_FORMS:
        raise ValueError(f"form: must be one of {', '.join(RISK_FORMS)}, got {form!r}")
    rewards, variances = problem(true_rewards=true_rewards, variances=variances)
    if form == "sum_to_one":
        weights = _size(variances)[..., None] / variances if weighted else np.ones_like(variances)
        centre = (weights * rewards).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
        rounding = 4 * rewards.shape[-1] * np.finfo(float).eps
        equal = np.abs(rewards - centre) <= rounding * np.abs(rewards).max(-1, keepdims=True)
        rewards = np.where(equal, 0.0, rewards - centre)
    size = _size(rewards)
    return rewards / size[..., None], size, variances


def _size(values: Array) -> Array:
    """Return a power of two near the largest value (...).

    Dividing by it rounds nothing, and then squares neither overflow nor vanish.
    """
    return np.ldexp(0.5, np.frexp(np.abs(values).max(-1))[1])


def interior_epsilon(reference: ArrayLike) -> Array:
    """Return n / (n - 1) min_y pi_0(y)^2 (...): up to this epsilon no probability can reach zero.

    Within ||pi - pi_0||^2 <= epsilon and sum_y (pi - pi_0) = 0 a single coordinate moves by at most
    sqrt(epsilon (n - 1) / n). Up to there Theorem 2.4 holds on the simplex, since both policies are
    those of `sum_to_one` (Equation (3)'s region, of radius lambda_min(Sigma) epsilon, is contained).
    """
    reference = distribution("reference", reference)
    arms = reference.shape[-1]
    if arms < 2:
        raise ValueError("reference: expected at least two arms")
    return arms / (arms - 1) * reference.min(-1) ** 2
