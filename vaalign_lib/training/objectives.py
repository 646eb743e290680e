"""Objectives: what a reward and its variance become before the optimizer sees them.

A policy optimizer here receives the reward of every token: the penalty
-beta * weight(x, y) * kl_t on each, and the score of the response on the last. An objective says what
weight and score are. `variance_aware` is the paper's method as it is programmed (Equation (5) with the
penalty as a detached reward); `variance_aware_exact` follows the gradient of the objective as it is
stated, and is `variance_aware` and `uwo` together. Arrays are (N, B), policies and responses, in one unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vaalign_lib.policies.checks import whole
from vaalign_lib.profiles import PPO
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, PolicyIndex, RewardSource, Truth


@dataclass(frozen=True)
class Outcome:
    """What a source of rewards says of responses (N, B)."""

    reward: Tensor  # sampled, Algorithm 7
    variance: Tensor  # Algorithm 8
    worst: Tensor  # the lowest member, or the lower end of the interval
    soft_worst: Tensor  # between mean and worst, see `effective`


@dataclass(frozen=True)
class Shaped:
    """What the optimizer sees (N, B): the score, and the weight of the KL penalty."""

    score: Tensor
    weight: Tensor


Objective = Callable[[Outcome, Tensor, Tensor], Shaped]


def vanilla(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (6): the reward and a plain KL penalty. Fixed point: `tabular.softmax_policy`."""
    return _plain(outcome.reward)


def variance_aware(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (5) as reward shaping: the KL penalty times the variance, held constant.

    Fixed point: `tabular.ppo_fixed_point`.
    """
    return Shaped(outcome.reward, outcome.variance)


def variance_aware_exact(outcome: Outcome, beta: Tensor, strength: Tensor) -> Shaped:
    """Equation (5) with its own gradient, which also reaches the logarithm inside the expectation.

    The gradient of E[sigma^2 ln(pi / pi_0)] is E[sigma^2 (ln(pi / pi_0) + 1) grad ln pi]: the second
    term costs every response beta sigma^2 once. Optimum: `tabular.exact_policy`. It is the gradient for
    `kl_penalty` 'kl' only, and others are refused (`objectives.Method.check`).
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


_ALL = (vanilla, variance_aware, variance_aware_exact, uwo, worst_case, reward_robust, effective)
OBJECTIVES: dict[str, Objective] = {one.__name__: one for one in _ALL}


@dataclass(frozen=True)
class Method:
    """What distinguishes runs: each number is one for all policies of a stack, or one for each.

    `sequence` lets every token answer for the whole penalty of its response; `token`, as in trl, only for the
    penalty from itself on. They differ where the penalty's weight varies with the response: then a token
    changes the weight of the tokens before it as well, and by `token` training converges to another policy
    than the objective's.
    """

    objective: str = "vanilla"  # a name of `OBJECTIVES`
    beta: float | Sequence[float] | None = None  # initial, of the KL penalty; None takes the settings'
    learning_rate: float | Sequence[float] | None = None  # None takes the settings'
    strength: float | Sequence[float] = 1.0  # of the objectives that have one besides beta
    credit: Literal["sequence", "token"] = "sequence"
    standardized: bool = True  # in reference deviations (`equal_mean_penalty`, `matched_kl`), or `as_printed`

    def check(self, settings: PPO) -> None:
        """Refuse a strength beyond its range, and an objective whose gradient is not a penalty's.

        The gradient of E[sigma^2 f(ln(pi / pi_0))] has beside the penalty's own the term sigma^2 f';
        it is sigma^2, which `variance_aware_exact` adds, for the log ratio itself only.
        """
        if self.objective == "reward_robust" and np.any(np.asarray(self.strength) > 1):
            raise ValueError(f"strength: expected 0 to 1 for reward_robust, got {self.strength}")
        if self.objective == "variance_aware_exact" and settings.kl_penalty != "kl":
            raise ValueError(
                "objective: variance_aware_exact has the gradient of kl_penalty 'kl' only, got "
                f"kl_penalty {settings.kl_penalty!r}; take variance_aware, or 'kl'"
            )

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.credit not in ("sequence", "token"):
            raise ValueError(f"credit: expected sequence or token, got {self.credit!r}")


@dataclass(frozen=True)
class Task:
    """What policies are asked, who judges their answers, and who knows better."""

    prompts: Sequence[str]
    source: RewardSource
    gold: Truth | None = None  # reported beside the reward, never optimized; None where nobody knows
    population: int = 1  # policies of the study, for sources of which each policy has its own

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not len(self.prompts):
            raise ValueError(f"task: expected a list of prompts, got {self.prompts!r}")
        for one in self.prompts:
            if not isinstance(one, str):
                raise ValueError(
                    f"prompts: expected texts, got {type(one).__name__}, {one!r:.60}; of chat messages "
                    "give the user's text, the tokenizer's template does the rest"
                )
        for name in ("judge", "true_reward"):
            if not callable(getattr(self.source, name, None)):
                raise ValueError(
                    f"source: expected an object with judge() and true_reward(), {self.source!r:.60} has "
                    f"no {name}()"
                )
        if self.gold is not None and not callable(self.gold):
            raise ValueError(f"gold: expected a function of prompts and responses, got {self.gold!r}")
        whole("population", self.population, 1)

    def judge(self, asked: Sequence[str], answers: Sequence[str], policies: PolicyIndex) -> Judgement:
        """Ask the source (Algorithm 6), and refuse what would spoil the weights."""
        judgement = self.source.judge(asked, answers, policies)
        if isinstance(judgement, Members):
            _checked("source: scores", judgement.scores, answers, judgement.scores.shape[1:])
        elif isinstance(judgement, Interval):
            _checked("source: bounds", judgement.bounds, answers, (2,))
            if judgement.quantiles is not None:
                _checked("source: quantiles", judgement.quantiles, answers, ())
        else:
            kind = type(judgement).__name__
            raise TypeError(f"source: expected Members or Interval, got {kind} from judge()")
        return judgement

    def truths(self, judgement: Judgement, asked: Sequence[str], answers: Sequence[str]) -> dict[str, Array]:
        """Return the true reward (Algorithm 9) and, where known, gold, in their own units (responses,)."""
        found = {"true_reward": self.source.true_reward(judgement, asked, answers)}
        if self.gold is not None:
            found["gold"] = self.gold(asked, answers)
        return {name: _checked(name, one, answers, ()) for name, one in found.items()}


def _checked(name: str, values: object, answers: Sequence[str], shape: tuple[int, ...]) -> Array:
    """Return finite numbers (responses, *shape), or refuse them by their name."""
    found = np.asarray(values)
    if found.dtype.kind not in "bfiu":
        raise ValueError(f"{name}: expected real numbers, got {found.dtype}")
    if found.shape != (len(answers), *shape):
        got = len(found) if found.ndim == 1 + len(shape) else f"shape {found.shape}"
        raise ValueError(f"{name}: expected {len(answers)}, one a response, got {got}")
    if len(bad := np.flatnonzero(~np.isfinite(found.reshape(len(answers), -1)).all(1))):
        raise ValueError(
            f"{name}: {len(bad)} of {len(answers)} are not finite, first for the response {answers[bad[0]]!r}"
        )
    return found
