"""Objectives: what a reward and its variance become before the optimizer sees them.

A policy optimizer here receives the reward of every token: the penalty
-beta * weight(x, y) * kl_t on each, and the score of the response on the last. An objective says what
weight and score are. `variance_aware` is the paper's method as it is programmed (Equation (5) with the
penalty as a detached reward); `variance_aware_exact` follows the gradient of the objective as it is
stated, and is `variance_aware` and `uwo` together. All arrays are (policies, responses), in one unit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What a source of rewards says of responses (policies, responses).

    Attributes:
        reward: sampled, Algorithm 7.
        variance: Algorithm 8.
        worst: the lowest member, or the lower end of the interval.
        soft_worst: between mean and worst, see `effective`.
    """

    reward: Tensor
    variance: Tensor
    worst: Tensor
    soft_worst: Tensor


@dataclass(frozen=True)
class Shaped:
    """What the optimizer sees (policies, responses): the score, and the weight of the KL penalty."""

    score: Tensor
    weight: Tensor


Objective = Callable[[Outcome, Tensor, Tensor], Shaped]


def vanilla(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (6): the reward and a plain KL penalty. Fixed point: `tabular.softmax_policy`."""
    return Shaped(outcome.reward, torch.ones_like(outcome.reward))


def variance_aware(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (5) as reward shaping: the KL penalty times the variance, held constant.

    Fixed point: `tabular.ppo_fixed_point`.
    """
    return Shaped(outcome.reward, outcome.variance)


def variance_aware_exact(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (5) with its own gradient, which also reaches the logarithm inside the expectation.

    The gradient of E[sigma^2 ln(pi / pi_0)] is E[sigma^2 (ln(pi / pi_0) + 1) grad ln pi]: the second
    term costs every response beta sigma^2 once. Optimum: `tabular.exact_policy`. It is the gradient for
    `kl_penalty` 'kl' only, and others are refused (`ppo.Method.check`).
    """
    return Shaped(outcome.reward - beta * outcome.variance, outcome.variance)


def uwo(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Uncertainty-weighted optimization (Coste et al., 2024): reward minus strength * variance."""
    return _plain(outcome.reward - strength * outcome.variance)


def worst_case(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Take the lowest member (Coste et al., 2024), or the lower end of an interval."""
    return _plain(outcome.worst)


def reward_robust(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Reward-robust RLHF: strength * nominal + (1 - strength) * worst, with strength in [0, 1]."""
    return _plain(strength * outcome.reward + (1 - strength) * outcome.worst)


def effective(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Take the certainty equivalent -ln E[exp(-strength * r)] / strength over the members.

    It falls from the mean (strength 0) to the worst case (infinity); for small strength it is the mean
    minus strength / 2 times the variance.
    """
    return _plain(outcome.soft_worst)


def _plain(score: Tensor) -> Shaped:
    return Shaped(score, torch.ones_like(score))


OBJECTIVES: dict[str, Objective] = {
    "vanilla": vanilla,
    "variance_aware": variance_aware,
    "variance_aware_exact": variance_aware_exact,
    "uwo": uwo,
    "worst_case": worst_case,
    "reward_robust": reward_robust,
    "effective": effective,
}
