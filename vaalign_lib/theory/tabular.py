"""Policies over finitely many arms, the last axis: closed forms, exact solvers and fixed points.

Of policies of the same value, the one nearest to the reference in the constraint's metric is returned.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import elementwise
from scipy.special import logsumexp, xlogy

from vaalign_lib.statistics.arrays import Array, broadcast, count, numbers

QuadraticForm = Literal["free", "sum_to_one", "simplex"]

# of R-hat(x, y), its variances sigma^2(x, y), the reference pi_0(y | x), each (..., arms), and beta (...)
PolicyOf = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike], Array]

_SAME = 1e-12  # estimates that differ by less, relative to the largest, and measures count as equal
_EPS = float(np.finfo(float).eps)
_NEWTON_STEPS = 200  # Newton's method is monotone here and takes about ten
_TINY = 1e-300  # variances are above it, so that their inverses are finite


def problem(
    *, reference: ArrayLike | None = None, variances: ArrayLike = 1.0, **rewards: ArrayLike
) -> tuple[Array, ...]:
    """Check rewards, variances (or one number for all) and the reference; return them of one shape.

    Raises:
        ValueError: an argument is not finite, not positive, not a distribution, or of another shape.
    """
    arrays = {name: numbers(name, values) for name, values in rewards.items()}
    arrays["variances"] = np.atleast_1d(numbers("variances", variances, above=_TINY))
    if reference is not None:
        arrays["reference"] = distribution("reference", reference)
    whole = broadcast(**arrays)
    arms = whole[0].shape[-1]
    for name, array in arrays.items():
        if name != "variances" and array.shape[-1:] != (arms,):
            raise ValueError(f"{name}: expected {arms} arms on the last axis, got shape {array.shape}")
    return tuple(whole)


def distribution(name: str, values: ArrayLike) -> Array:
    """Return probabilities (..., arms); refuse negative ones, and those that do not sum to 1."""
    array = numbers(name, values, at_least=0)
    if array.ndim == 0 or not np.allclose(array.sum(-1), 1.0, atol=1e-9, rtol=0):
        raise ValueError(f"{name}: expected probabilities that sum to 1 over the last axis")
    return array


def with_strength(
    arrays: tuple[Array, ...], name: str, strength: ArrayLike, **limits: float
) -> tuple[Array, ...]:
    """Broadcast arrays (..., arms) and a strength (...), which lacks the axis of the arms.

    Beside a single problem it may have any shape; more axes than a batch has are refused, since they are
    most likely the arms'.
    """
    strength = numbers(name, strength, **limits)  # type: ignore[arg-type]
    batch, arms = arrays[0].shape[:-1], arrays[0].shape[-1]
    try:
        if batch and strength.ndim > len(batch):
            raise ValueError
        shape = np.broadcast_shapes(batch, strength.shape)
    except ValueError:
        raise ValueError(f"{name}: shape {strength.shape} does not fit the batch {batch}") from None
    return *(np.broadcast_to(a, (*shape, arms)) for a in arrays), np.broadcast_to(strength, shape)


def _penalized(
    estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike
) -> tuple[Array, Array, Array]:
    """Check and broadcast; return estimates, reference and the weights beta sigma^2, each (..., arms).

    Beyond 25 decades to either side of rewards over variances a beta changes no policy in double
    precision, but would overflow; it is taken to be there.
    """
    checked = problem(estimates=estimates, variances=variances, reference=reference)
    estimates, variances, reference, beta = with_strength(checked, "beta", beta, above=0)
    size = np.where(reference > 0, np.abs(estimates), 0.0).max(-1)
    size = np.where(size > 0, size, 1.0)
    with np.errstate(over="ignore"):
        beta = np.clip(beta, 1e-25 * size / variances.max(-1), 1e25 * size / variances.min(-1))
        weights = variances * beta[..., None]
    return estimates, reference, _representable(np.where(weights > 0, weights, np.nan))


def _representable(policy: Array) -> Array:
    """Refuse what is no number: sizes of arguments so far apart that a policy cannot be computed."""
    if not np.isfinite(policy).all():
        raise ValueError("estimates, variances: sizes are too far apart for double precision; scale them")
    return policy


# --- Equations (2) and (3): a linear reward in a quadratic trust region ----------------------------


def matched_epsilon(variances: ArrayLike, epsilon: ArrayLike) -> Array:
    """Return lambda_min(Sigma) * epsilon (...), the radius of Equation (3) in Theorem 2.4."""
    checked = np.atleast_1d(numbers("variances", variances, above=_TINY))
    variances, epsilon = with_strength((checked,), "epsilon", epsilon, at_least=0)
    return variances.min(-1) * epsilon


def trust_region_policy(
    estimates: ArrayLike,
    reference: ArrayLike,
    epsilon: ArrayLike,
    *,
    variances: ArrayLike = 1.0,
    form: QuadraticForm = "simplex",
) -> Array:
    """Maximize R-hat' pi subject to sum_y sigma^2(y) (pi(y) - pi_0(y))^2 <= epsilon, a radius (...).

    With the default variances this is Equation (2), with the variances of the estimates Equation (3).
    The forms differ in what else is required of pi (..., arms):

    `free`        nothing, as in the paper's closed forms (Appendix A): pi need not be a distribution
    `sum_to_one`  sum_y pi(y) = 1
    `simplex`     sum_y pi(y) = 1 and pi >= 0
    """
    if form not in get_args(QuadraticForm):
        raise ValueError(f"form: must be one of {', '.join(get_args(QuadraticForm))}, got {form!r}")
    checked = problem(estimates=estimates, variances=variances, reference=reference)
    estimates, variances, reference, epsilon = with_strength(checked, "epsilon", epsilon, at_least=0)
    estimates = _scaled(estimates)
    if form == "simplex":
        return _representable(_simplex_policy(estimates, variances, reference, epsilon))
    if form == "sum_to_one":
        estimates = _centred(estimates, 1 / variances)
    direction = estimates / variances
    length = np.sqrt((estimates * direction).sum(-1))  # (...)
    step = np.divide(np.sqrt(epsilon), length, out=np.zeros_like(length), where=length > 0)
    return _representable(reference + step[..., None] * direction)


def _scaled(estimates: Array) -> Array:
    """Divide by the largest estimate's size, which changes no optimum of a linear reward."""
    scale = np.maximum(estimates.max(-1), -estimates.min(-1))  # (...)
    return estimates / np.where(scale > 0, scale, 1.0)[..., None]


def _centred(estimates: Array, weights: Array) -> Array:
    """Subtract the weighted mean over the arms; what is left of equal rewards is exactly zero.

    The estimates are those of `_scaled`, at most 1 in size.
    """
    mean = np.einsum("...i,...i->...", weights, estimates) / weights.sum(-1)  # (...)
    centred = estimates - mean[..., None]
    centred[np.abs(centred) <= _SAME] = 0.0
    return centred


def _simplex_policy(estimates: Array, variances: Array, reference: Array, epsilon: Array) -> Array:
    """Follow the path of optimal policies from the reference outwards until the constraint binds.

    The KKT conditions give pi(t) = max(0, pi_0 + (t R-hat - a) / sigma^2) with a(t) from the sum.
    As t grows the path is piecewise linear and the set of arms with pi > 0 only shrinks: an arm
    that reaches zero has R-hat below the precision-weighted mean of the support, and dropping it
    raises that mean. So at most arms - 1 pieces lead to the exact solution. Problems that have
    arrived drop out of the batch.
    """
    shape = estimates.shape
    epsilon = epsilon.ravel()
    estimates, variances, reference = (a.reshape(-1, shape[-1]) for a in (estimates, variances, reference))
    policy = reference.copy()  # (problems, arms)
    support = np.ones(policy.shape, dtype=bool)
    walking = np.arange(len(policy))
    while walking.size:
        arrays = (policy, support, estimates, variances, reference, epsilon)
        policy[walking], emptied = _next_piece(*(array[walking] for array in arrays))
        support[walking] &= ~emptied
        walking = walking[emptied.any(-1)]
    return (policy / policy.sum(-1, keepdims=True)).reshape(shape)  # of rounding on long pieces


def _next_piece(*problem: Any) -> tuple[Array, NDArray[np.bool_]]:
    """Return the policies at the end of the path's next piece and the arms emptied there, (k, arms)."""
    policy, support, estimates, variances, reference, epsilon = problem
    precision = support / variances
    slope = precision * _centred(estimates, precision)  # (k, arms)
    falls, deviation = slope < 0, policy - reference
    to_zero = np.divide(policy, -slope, out=np.full(policy.shape, np.inf), where=falls)
    # the piece meets the boundary where a t^2 + 2 b t + c = 0
    a, b = (variances * slope**2).sum(-1), (variances * slope * deviation).sum(-1)  # (k,)
    c = np.minimum((variances * deviation**2).sum(-1) - epsilon, 0.0)
    to_boundary = np.divide(-b + np.sqrt(b**2 - a * c), a, out=np.full(a.shape, np.inf), where=a > 0)
    step = np.minimum(to_zero.min(-1), to_boundary)  # (k,)
    emptied = falls & (to_zero <= step[:, None])
    step = np.where(np.isfinite(step), step, 0.0)
    return np.where(emptied, 0.0, policy + step[:, None] * slope), emptied


# --- Theorem 2.7 and its relatives: penalties on the log ratio ------------------------------------


def softmax_policy(estimates: ArrayLike, reference: ArrayLike, beta: ArrayLike) -> Array:
    """Vanilla: maximize E_pi[R-hat] - beta KL(pi || pi_0), Equation (6): pi ~ pi_0 exp(R-hat / beta)."""
    return printed_policy(estimates, 1.0, reference, beta)


def mean_minus_variance_policy(
    estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike, aversion: ArrayLike
) -> Array:
    """Maximize E_pi[R-hat - aversion * sigma^2] - beta KL(pi || pi_0), a pessimistic reward."""
    checked = problem(estimates=estimates, variances=variances, reference=reference)
    estimates, variances, reference, aversion = with_strength(checked, "aversion", aversion)
    return softmax_policy(estimates - aversion[..., None] * variances, reference, beta)


def printed_policy(
    estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike
) -> Array:
    """Theorem 2.7 as printed: pi(y) = pi_0(y) exp(R-hat(y) / (beta sigma^2(y))) / Z.

    This maximizes E_pi[R-hat / (beta sigma^2)] - KL(pi || pi_0), not the objective that the theorem
    states, and changes when a constant is added to the rewards.
    """
    estimates, reference, weights = _penalized(estimates, variances, reference, beta)
    exponents = _near_zero(np.where(reference > 0, estimates / weights, -np.inf), 1.0)
    return _normalized(_log(reference) + exponents)


def exact_policy(estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike) -> Array:
    """Maximize E_pi[R-hat] - beta E_pi[sigma^2 ln(pi / pi_0)], the Lagrangian of Theorem 2.7.

    The KKT conditions give ln(pi / pi_0) = (R-hat - nu) / (beta sigma^2) - 1 with one multiplier nu
    per prompt, from the normalization; since sigma^2 varies with the arm, nu does not cancel.
    """
    estimates, reference, weights = _penalized(estimates, variances, reference, beta)
    return _tilt(_log(reference), estimates, weights, offset=1.0)


def ppo_fixed_point(
    estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike
) -> Array:
    """Return the fixed point of PPO or RLOO with the penalty of Equation (5) as a detached reward.

    The policy gradient of the reward R-hat - beta sigma^2 ln(pi / pi_0), held constant, vanishes
    where that reward is the same for all arms: ln(pi / pi_0) = (R-hat - nu) / (beta sigma^2).
    It maximizes E_pi[R-hat] - beta sum_y sigma^2 (pi ln(pi / pi_0) - pi + pi_0), a Bregman
    divergence: at least 0, and 0 only at the reference.
    """
    estimates, reference, weights = _penalized(estimates, variances, reference, beta)
    return _tilt(_log(reference), estimates, weights, offset=0.0)


def grpo_fixed_point(
    estimates: ArrayLike, variances: ArrayLike, reference: ArrayLike, beta: ArrayLike
) -> Array:
    """Return the fixed point of a weighted k3 penalty inside the loss, as GRPO has it.

    With samples from pi the gradient of beta sigma^2 (pi_0 / pi - 1 - ln(pi_0 / pi)) through the log
    ratio is that of a forward KL, so R-hat - beta sigma^2 (1 - pi_0 / pi) = nu: the maximum of
    E_pi[R-hat] - beta sum_y sigma^2 (pi_0 ln(pi_0 / pi) + pi - pi_0). Not even with equal variances
    is it the softmax. GRPO's division of the advantages by their standard deviation, which makes beta
    vary with the prompt, is left out.
    """
    estimates, reference, weights = _penalized(estimates, variances, reference, beta)
    estimates = _near_zero(np.where(reference > 0, estimates, -np.inf), weights.min(-1))
    masses, poles = reference * weights, estimates - weights  # (..., arms)
    poles = _relative_to((poles + masses).argmax(-1), poles)

    def newton(nu: Array) -> tuple[Array, Array]:  # on 1 / sum(pi), which is concave and increasing in nu
        terms = masses / (nu[..., None] - poles)
        total, slope = terms.sum(-1), (terms / (nu[..., None] - poles)).sum(-1)  # (...)
        return total - 1, total * (total - 1) / slope

    policy = masses / (_multiplier((poles + masses).max(-1), newton)[..., None] - poles)
    return _representable(policy / policy.sum(-1, keepdims=True))


def _tilt(log_reference: Array, estimates: Array, weights: Array, offset: float) -> Array:
    """Return pi_0 exp((R-hat - nu) / weights - offset) with nu from the normalization.

    The logarithm of the sum is convex and decreasing in nu, and Newton's method is monotone when it
    starts where one arm alone already has all the mass.
    """
    alone = estimates + weights * (log_reference - offset)  # nu, were this the only arm
    estimates = _relative_to(alone.argmax(-1), estimates)

    def newton(nu: Array) -> tuple[Array, Array]:
        log_policy = log_reference + (estimates - nu[..., None]) / weights - offset
        top = log_policy.max(-1, keepdims=True)  # (..., 1)
        mass = np.exp(log_policy - top)
        total = mass.sum(-1)  # (...)
        excess = np.log(total) + top[..., 0]
        return excess, excess * total / (mass / weights).sum(-1)

    nu = _multiplier((estimates + weights * (log_reference - offset)).max(-1), newton)
    return _normalized(log_reference + (estimates - nu[..., None]) / weights)


def _multiplier(nu: Array, newton: Callable[[Array], tuple[Array, Array]]) -> Array:
    """Return the nu at which every policy has the mass 1, by Newton's method from a start (...).

    Everywhere the mass must be 1, or the step in nu 0, up to rounding.
    """
    for _ in range(_NEWTON_STEPS):
        excess, step = newton(nu)
        nu = nu + step
        if ((np.abs(excess) <= 64 * _EPS) | (np.abs(step) <= 2 * _EPS * np.abs(nu))).all():
            break
    return nu


def _near_zero(values: Array, unit: Array | float) -> Array:
    """Subtract the largest value of rows so far from zero that a unit would be lost beside them.

    Arms outside the reference are -inf.
    """
    top = values.max(-1)  # (...)
    size = np.maximum(top, -np.where(np.isfinite(values), values, np.inf).min(-1))
    return values - np.where(size > 1e6 * unit, top, 0.0)[..., None]


def _log(probabilities: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def _normalized(log_policy: Array) -> Array:
    return _representable(np.exp(log_policy - logsumexp(log_policy, axis=-1, keepdims=True)))


def _relative_to(arm: NDArray[np.intp], values: Array) -> Array:
    """Subtract the value of one arm, so that nu, which lies near it, keeps its leading digits."""
    return values - np.take_along_axis(values, arm[..., None], -1)


def expected_reward(policy: ArrayLike, rewards: ArrayLike) -> Array:
    """Return pi' r. Shapes: (..., arms), (..., arms) -> (...)."""
    policy, rewards, _ = problem(policy=policy, rewards=rewards)
    return (policy * rewards).sum(-1)


def weighted_kl(
    policy: ArrayLike,
    reference: ArrayLike,
    variances: ArrayLike = 1.0,
    prompt_weights: ArrayLike | None = None,
) -> Array:
    """Return E[sigma^2 ln(pi / pi_0)], the left side of Theorem 2.7's constraint.

    With unit variances this is KL(pi || pi_0), in nats. With others it is no divergence: it can be
    negative, and its minimum is not at the reference. It is inf where pi > 0 = pi_0. Given weights of
    the prompts, rho (prompts,), policies (..., prompts, arms) are averaged over the prompts.
    """
    policy, reference, variances = broadcast(
        policy=np.atleast_1d(numbers("policy", policy, at_least=0)),
        reference=numbers("reference", reference, at_least=0),
        variances=numbers("variances", variances, above=_TINY),
    )
    with np.errstate(divide="ignore"):
        per_prompt = (variances * (xlogy(policy, policy) - xlogy(policy, reference))).sum(-1)
    if prompt_weights is None:
        return per_prompt
    weights = distribution("prompt_weights", prompt_weights)
    if weights.shape != per_prompt.shape[-1:]:
        raise ValueError(f"prompt_weights: expected shape {per_prompt.shape[-1:]}, got {weights.shape}")
    return (per_prompt * weights).sum(-1)


# --- choosing beta ------------------------------------------------------------------------------------


def solve_beta(
    measure: Callable[[Array, NDArray[np.intp]], Array], target: ArrayLike, draws: int, name: str = "target"
) -> Array:
    """Find the beta of every draw at which a decreasing measure of its policy takes the target value.

    The measure is called with betas (k,) and the indices of their draws (k,), and returns values (k,); the
    target is (draws,) or a scalar, of that name in errors. Beta (draws,) is searched from 1e-8 to 1e8; it is
    0 where the measure stays below the target even there: the constraint does not bind, the policy is
    greedy. A measure that stays above the target even at the largest is a ValueError.
    """
    index, goal = np.arange(count("draws", draws)), numbers(name, target)
    if goal.shape not in ((), (1,), index.shape):
        raise ValueError(f"{name}: expected a number or {draws} of them, got shape {goal.shape}")
    goal = np.broadcast_to(goal, index.shape)

    def excess(log_beta: Array, draw: NDArray[Any]) -> Array:
        chosen = draw.astype(np.intp)
        values = np.asarray(measure(np.exp(log_beta), chosen), dtype=float)
        if values.shape != chosen.shape or np.isnan(values).any():
            got = f"got shape {values.shape} with {np.isnan(values).sum()} NaN"
            raise ValueError(f"measure: expected {chosen.size} numbers, {got}")
        return values - goal[chosen]

    low, high = np.full(draws, np.log(1e-8)), np.full(draws, np.log(1e8))
    at_most = excess(high, index)
    if (missed := at_most > _SAME).any():
        least = f"the smallest attainable value is {(goal + at_most)[missed].max():g}"
        raise ValueError(f"{name}: {goal[missed].min():g} cannot be reached, {least}")
    binds = excess(low, index) > 0
    beta = np.where(binds, np.exp(high), 0.0)
    binds &= at_most < 0  # the others are at the smallest attainable value
    if binds.any():
        root = elementwise.find_root(excess, (low[binds], high[binds]), args=(index[binds].astype(float),))
        if not root.success.all():
            raise ValueError(f"{name}: no beta was found; the measure must decrease in beta")
        beta[binds] = np.exp(root.x)
    return beta


def constrained_policy(
    estimates: ArrayLike,
    variances: ArrayLike,
    reference: ArrayLike,
    epsilon: ArrayLike,
    prompt_weights: ArrayLike | None = None,
    policy_of: PolicyOf = exact_policy,
) -> tuple[Array, Array]:
    """Solve the problem of Theorem 2.7: maximize E[R-hat] subject to E[sigma^2 ln(pi / pi_0)] <= epsilon.

    One beta serves all prompts of a draw, since the constraint is an average over them; each prompt
    has its own multiplier nu for the normalization.

    Estimates are (draws, prompts, arms), variances and reference are broadcast to them, epsilon is (draws,)
    or a scalar, and the prompts' weights rho (prompts,) are uniform by default. Another `policy_of` meets the
    same constraint. Returns pi (draws, prompts, arms) and beta (draws,), 0 where nothing binds.
    """
    estimates, variances, reference = problem(estimates=estimates, variances=variances, reference=reference)
    if estimates.ndim != 3:
        raise ValueError(f"estimates: expected (draws, prompts, arms), got shape {estimates.shape}")
    draws, prompts, _ = estimates.shape
    weights = np.full(prompts, 1 / prompts) if prompt_weights is None else prompt_weights
    spread = np.ptp(estimates, axis=-1).max(-1)  # (draws,)
    scale = np.where(spread > 0, spread, 1.0) / variances.mean((-2, -1))  # of beta (draws,)

    def policy_at(beta: Array, draw: NDArray[np.intp]) -> Array:
        per_prompt = np.broadcast_to((beta * scale[draw])[:, None], (len(draw), prompts))
        return policy_of(estimates[draw], variances[draw], reference[draw], per_prompt)

    def measure(beta: Array, draw: NDArray[np.intp]) -> Array:
        return weighted_kl(policy_at(beta, draw), reference[draw], variances[draw], weights)

    beta = solve_beta(measure, epsilon, draws, name="epsilon")
    binding = np.flatnonzero(beta > 0)
    policy = _greedy_policy(estimates, variances, reference)
    if binding.size:
        policy[binding] = policy_at(beta[binding], binding)
    return policy, beta * scale


def _greedy_policy(estimates: Array, variances: Array, reference: Array) -> Array:
    """Return the limit beta -> 0 of the exact policy: all mass on the best arms of the reference.

    Between equally good arms the limit minimizes E[sigma^2 ln(pi / pi_0)].
    """
    allowed = np.where(reference > 0, estimates, -np.inf)
    best = allowed >= allowed.max(-1, keepdims=True)
    log_reference = np.where(best, _log(reference), -np.inf)
    return _tilt(log_reference, np.zeros_like(estimates), variances, offset=1.0)
