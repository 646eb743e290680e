"""Reward-robust RLHF (arXiv 2409.15360) over finitely many responses: Equations 5 to 7 in closed form.

Two things are called the worst case. What is trained in practice is the pointwise minimum: every response
gets the lowest of its M rewards. Equation 6 is the minimum over reward functions of the expected return,
which is at least as much (the minimum is concave). Under a KL penalty its optimum is, by the minimax theorem,
the softmax policy of one mixture of the reward functions, the same for all prompts and responses:

    max_pi min_i E_pi[r_i] - beta KL = min_w beta E_x[ln E_pi_0 exp(sum_i w_i r_i / beta)],  w in the simplex.

Shapes: N problems, M reward functions, P prompts, S responses to each, pi_0 uniform over them.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from vaalign_lib.statistics.arrays import Array, number, numbers

STEPS = 500  # of the mixture's weights
GAP = 1e-4  # of Equation 6's value to its bound, in deviations of the rewards
Rule = float | str  # lambda, of nominal and lowest, or the `mean` or `max` of the members


def integrated(nominal: Array, members: Array, rule: Rule) -> Array:
    """Return one reward (...) of a nominal one (...) and the members' (..., M): for a number lambda

    lambda * nominal + (1 - lambda) * lowest member (Equation 7, pointwise), or their `mean` or `max`.
    """
    if rule == "mean":
        return np.asarray(members.mean(-1))
    if rule == "max":
        return np.asarray(members.max(-1))
    weight = number("rule", rule, at_least=0, at_most=1)
    return np.asarray(weight * nominal + (1 - weight) * members.min(-1))


@dataclass(frozen=True)
class Robust:
    """Policies that are best by Equation 7 with a KL penalty.

    Attributes:
        policy: (N, P, S).
        weights: (N, M), of the worst-case mixture.
        value: (N,), lambda E[nominal] + (1 - lambda) min_i E[r_i] - beta KL, mean over prompts.
        bound: (N,), which no policy's value exceeds.
    """

    policy: Array
    weights: Array
    value: Array
    bound: Array


def worst_return_policy(nominal: Array, members: Array, weight: float, beta: float | Array) -> Robust:
    """Maximize weight * E[nominal] + (1 - weight) * min_i E[r_i] - beta KL, nominal (N, P, S), members (N, M,
    P, S), beta a number or (N,).

    The mixture's weights descend the dual by exponentiated gradient; a step that leads up is halved.
    """
    number("weight", weight, at_least=0, at_most=1)
    beta = np.broadcast_to(numbers("beta", beta, above=0), nominal.shape[:1])[:, None, None]  # (N, 1, 1)
    size, count = members.shape[:2]
    weights, step = np.full((size, count), 1 / count), np.ones(size)  # (N, M), (N,)
    unit = members.std((1, 2, 3)) + 1e-300  # (N,)
    bound, policy, returns = _dual(nominal, members, weight, beta, weights)
    for _ in range(STEPS):
        if ((weights * returns).sum(1) - returns.min(1) <= GAP * unit).all():
            break
        scaled = -step[:, None] * (1 - weight) * (returns - returns.min(1, keepdims=True)) / unit[:, None]
        trial = weights * np.exp(scaled)  # (N, M)
        trial /= trial.sum(1, keepdims=True)
        found = _dual(nominal, members, weight, beta, trial)
        down = found[0] <= bound + 1e-13 * np.abs(bound)  # (N,)
        step = np.where(down, 1.5 * step, step / 4)
        weights = np.where(down[:, None], trial, weights)
        bound = np.where(down, found[0], bound)
        policy = np.where(down[:, None, None], found[1], policy)
        returns = np.where(down[:, None], found[2], returns)
    return Robust(policy, weights, robust_value(policy, nominal, members, weight, beta[:, 0, 0]), bound)


def robust_value(policy: Array, nominal: Array, members: Array, weight: float, beta: Array | float) -> Array:
    """Return Equation 7's value of policies less beta times their KL to the uniform one (N,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(policy > 0, policy * np.log(policy * policy.shape[-1]), 0).sum(-1).mean(-1)  # (N,)
    expected = (policy * nominal).sum(-1).mean(-1)  # (N,)
    worst = (policy[:, None] * members).sum(-1).mean(-1).min(1)  # (N,)
    return np.asarray(weight * expected + (1 - weight) * worst - beta * kl)


def _dual(
    nominal: Array, members: Array, weight: float, beta: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Return the bound (N,), its softmax policy (N, P, S) and the members' returns under it (N, M)."""
    mixed = weight * nominal + (1 - weight) * np.einsum("nm,nmps->nps", weights, members)  # (N, P, S)
    top = logsumexp(mixed / beta, axis=-1, keepdims=True)  # (N, P, 1)
    policy = np.exp(mixed / beta - top)  # (N, P, S)
    bound = (beta[..., 0] * (top[..., 0] - np.log(mixed.shape[-1]))).mean(1)
    returns = np.einsum("nps,nmps->nm", policy, members) / mixed.shape[1]
    return bound, policy, returns
