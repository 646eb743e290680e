"""Reward functions for TRL's trainers that also say how uncertain each reward is.

They return a list of rewards, None where there is none, as TRL wants it, and log the variances as
`reward_variance`, which `trl_trainers` reads.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from vaalign_lib.objectives import OBJECTIVES, Outcome
from vaalign_lib.ppo import Unit
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, RewardSource, VarianceOf
from vaalign_lib.trl_trainers import VARIANCE

WITH_WEIGHTS = (
    "variance_aware",
    "variance_aware_exact",
)  # more than a change of reward: the trainers'
Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]


def reward_function(
    source: RewardSource,
    *,
    objective: str = "vanilla",
    strength: float = 1.0,
    unit: Unit | None = None,
    variance_of: VarianceOf | None = None,
    policy: int = 0,
    seed: int = 0,
) -> RewardFunction:
    """Return a reward function of TRL that asks a source of this library.

    Args:
        source: any, such as a `ClassifierEnsemble` or a `PromptedJudge`.
        objective: a name of `objectives.OBJECTIVES` that is a change of reward only.
        strength: of the objective.
        unit: what rewards and variances are measured in, by default their own; see `reference_unit`.
        variance_of: of an ensemble a single `member` or the `mean`; by default as the source says.
        policy: number of the policy, for sources of which each policy has its own.
        seed: of the draws from intervals; they also depend on the step and the process.

    Raises:
        ValueError: the objective is not known, or is more than a change of reward.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective in WITH_WEIGHTS:
        raise ValueError(
            f"objective: {objective} weighs the KL penalty; leave it out here and take a trainer of "
            "trl_trainers"
        )
    draws, measured = _Draws(seed), unit or Unit()

    def rewards(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        **_: Any,
    ) -> Rewards:
        asked, answers = [text_of(one) for one in prompts], [text_of(one) for one in completions]
        judgement = source.judge(asked, answers, np.full(len(asked), policy))
        judgement = _of(judgement, variance_of)
        step = int(getattr(trainer_state, "global_step", 0))
        outcome = _outcome(judgement, draws.uniforms(step, len(asked)), measured, strength)
        no_beta, strengths = torch.zeros(1, 1), torch.full((1, 1), strength)
        score = OBJECTIVES[objective](outcome, no_beta, strengths).score[0].tolist()
        variance = outcome.variance[0].tolist()
        if log_extra is not None:
            log_extra(VARIANCE, [_none_if_nan(one) for one in variance])
        return [_none_if_nan(one) for one in score]

    rewards.__name__ = objective if objective != "vanilla" else "reward"
    return rewards


def with_variances(function: Callable[..., tuple[Rewards, Rewards]]) -> RewardFunction:
    """Make a reward function of TRL from one that returns rewards and their variances.

    Args:
        function: takes what TRL's reward functions take, and returns two lists; None where a completion
            could not be judged.
    """

    @wraps(function)
    def rewards(*args: Any, log_extra: Any = None, **columns: Any) -> Rewards:
        found, variances = function(*args, **columns)
        if log_extra is not None:
            log_extra(VARIANCE, list(variances))
        return list(found)

    return rewards


def reference_unit(
    source: RewardSource, prompts: Sequence[str], responses: Sequence[str], policy: int = 0
) -> Unit:
    """Return the unit in which rewards of the reference policy's responses have mean 0 and deviation 1,
    and their variances mean 1: then beta means the same with and without variances.
    """
    judgement = source.judge(prompts, responses, np.full(len(prompts), policy))
    uniforms = np.random.default_rng(0).random(len(prompts))
    return Unit.of(judgement.sample(uniforms), judgement.variance())


def text_of(message: Any) -> str:
    """Return a prompt or completion as text: as it is, or what the last message of it says."""
    return message if isinstance(message, str) else str(message[-1]["content"])


class _Draws:
    """Numbers that depend on seed, step, process and how often they were asked for in a step."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.calls = seed, -1, 0

    def uniforms(self, step: int, count: int) -> Array:
        """Return numbers in [0, 1) (count,); a run that is resumed at a step draws the same again."""
        self.calls = self.calls + 1 if step == self.step else 0
        self.step = step
        process = PartialState().process_index
        return np.random.default_rng([self.seed, step, process, self.calls]).random(count)


def _of(judgement: Judgement, variance_of: VarianceOf | None) -> Judgement:
    if variance_of is None:
        return judgement
    if isinstance(judgement, Interval):
        raise ValueError("variance_of: an interval has no members; leave it out")
    return Members(judgement.scores, variance_of)


def _outcome(judgement: Judgement, uniforms: Array, unit: Unit, strength: float) -> Outcome:
    """Return what a judgement says, in a unit (1, responses)."""
    strengths = np.full(len(uniforms), strength / unit.scale)
    rewards = judgement.sample(uniforms), judgement.worst(), judgement.soft_worst(strengths)
    reward, worst, soft = (_row((one - unit.location) / unit.scale) for one in rewards)
    return Outcome(reward, _row(judgement.variance() / unit.variance), worst, soft)


def _row(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))[None]


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value
