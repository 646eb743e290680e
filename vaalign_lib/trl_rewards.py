"""Reward functions for TRL's trainers that also say how uncertain each reward is.

They return a list of rewards, None where there is none, as TRL wants it, and log the variances as
`reward_variance`, which `trl_trainers` reads.
"""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, get_args

import numpy as np
import torch

from vaalign_lib.objectives import OBJECTIVES, Outcome
from vaalign_lib.ppo import Unit
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, RewardSource, VarianceOf
from vaalign_lib.trl_trainers import VARIANCE

WITH_WEIGHTS = (
    "variance_aware",
    "variance_aware_exact",
)  # more than a change of reward: the trainers'
Rewards = list[float | None]
RewardFunction = Callable[..., Any]  # gives rewards, or a coroutine that does


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
        variance_of: of an ensemble a single `member` or the `mean`; by default as the source says. One
            of the mean should go with a unit of the same kind.
        policy: number of the policy, for sources of which each policy has its own.
        seed: of the draws from intervals; they also depend on the step and the text.

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
    if variance_of not in (None, *get_args(VarianceOf)):
        raise ValueError(f"variance_of: expected member or mean, got {variance_of!r}")
    if objective == "reward_robust" and not 0 <= strength <= 1:
        raise ValueError(f"strength: expected 0 to 1 for reward_robust, got {strength}")
    measured = unit or Unit()

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
        draws, strengths = _uniforms(seed, step, asked, answers), np.full(len(asked), strength)
        outcome = Outcome(*map(_row, measured.of_judgement(judgement, draws, strengths)))
        no_beta, one_strength = torch.zeros(1, 1), torch.full((1, 1), strength)
        score = OBJECTIVES[objective](outcome, no_beta, one_strength).score[0].tolist()
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
            could not be judged. It may be a coroutine.
    """

    def split(both: tuple[Rewards, Rewards], log_extra: Any) -> Rewards:
        found, variances = both
        if log_extra is not None:
            log_extra(VARIANCE, list(variances))
        return list(found)

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def later(*args: Any, **columns: Any) -> Rewards:
            return split(await function(*args, **columns), columns.get("log_extra"))

        return later

    @wraps(function)
    def rewards(*args: Any, **columns: Any) -> Rewards:
        return split(function(*args, **columns), columns.get("log_extra"))

    return rewards


def reference_unit(
    source: RewardSource,
    prompts: Sequence[str],
    responses: Sequence[str],
    policy: int = 0,
    variance_of: VarianceOf | None = None,
) -> Unit:
    """Return the unit in which rewards of the reference policy's responses have mean 0 and deviation 1,
    and their variances mean 1: then beta means the same with and without variances.

    Raises:
        ValueError: the rewards of what could be judged are all the same.
    """
    judgement = _of(source.judge(prompts, responses, np.full(len(prompts), policy)), variance_of)
    rewards = judgement.sample(_uniforms(0, 0, prompts, responses))
    judged = np.isfinite(rewards)
    if not judged.any() or np.ptp(rewards[judged]) == 0:
        raise ValueError(
            f"responses: {judged.sum()} of {len(judged)} got a reward, and these are all the same; a "
            "unit needs some that differ"
        )
    return Unit.of(rewards[judged], judgement.variance()[judged])


def text_of(message: Any) -> str:
    """Return a prompt or completion as text: as it is, or what the last message of it says.

    Raises:
        ValueError: the message has other parts than text.
    """
    if isinstance(message, str):
        return message
    content = message[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(one.get("type") != "text" for one in parts):
        kinds = ", ".join(sorted({str(one.get("type")) for one in parts}))
        raise ValueError(f"content: sources of this library judge text, got parts of type {kinds}")
    return "".join(one["text"] for one in parts)


def _uniforms(seed: int, step: int, prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """Return a number in [0, 1) for each text (texts,), whichever process asks and what else is judged.

    A run that is resumed at a step draws the same again; of equal texts each has its own number.
    """
    seen: Counter[tuple[str, str]] = Counter()
    numbers = []
    for text in zip(prompts, responses, strict=True):
        seen[text] += 1
        digest = hashlib.sha256(repr((seed, step, seen[text], text)).encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "big") / 2**64)
    return np.array(numbers)


def _of(judgement: Judgement, variance_of: VarianceOf | None) -> Judgement:
    if variance_of is None:
        return judgement
    if isinstance(judgement, Interval):
        raise ValueError("variance_of: an interval has no members; leave it out")
    return Members(judgement.scores, variance_of)


def _row(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))[None]


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value
