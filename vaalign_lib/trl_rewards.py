"""Reward functions for TRL's trainers that also say how uncertain each reward is.

They return a list of rewards, None where there is none, as TRL wants it, and log the variances as
`reward_variance`, which `trl_trainers` reads. Of several functions beside each other, whose rewards TRL
adds, it adds the variances.
"""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch

from vaalign_lib.conversation import dialogue_text, prompt_text
from vaalign_lib.objectives import OBJECTIVES, Outcome
from vaalign_lib.ppo import Unit
from vaalign_lib.rewards.base import (
    Array,
    Interval,
    Judgement,
    Members,
    RewardSource,
    VarianceOf,
    check_variance_of,
)
from vaalign_lib.trl_trainers import LARGEST, VARIANCE

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
    name: str = "",
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
        seed: of the draws from intervals; they also depend on the step, the text and the process.
        name: under which TRL logs the rewards, by default the objective's; each of two functions needs
            its own.

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
    if variance_of is not None:
        check_variance_of(variance_of)
    most = 1 if objective == "reward_robust" else LARGEST
    if not 0 <= strength <= most:
        raise ValueError(f"strength: expected 0 to {most:g} for {objective}, got {strength}")
    measured = unit or Unit()

    def rewards(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        **_: Any,
    ) -> Rewards:
        asked = [text_of(one, prompt=True) for one in prompts]
        answers = [text_of(one) for one in completions]
        judgement = _of(source.judge(asked, answers, np.full(len(asked), policy)), variance_of)
        if judgement.variance().shape != (len(answers),):
            raise ValueError(
                f"source: expected a judgement of each of {len(answers)} completions, got "
                f"{judgement.variance().size}"
            )
        step = int(getattr(trainer_state, "global_step", 0))
        draws, strengths = _uniforms(seed, step, asked, answers), np.full(len(asked), strength)
        outcome = Outcome(*map(_row, measured.of_judgement(judgement, draws, strengths)))
        no_beta, one_strength = torch.zeros(1, 1), torch.full((1, 1), strength)
        score = OBJECTIVES[objective](outcome, no_beta, one_strength).score[0].tolist()
        variance = outcome.variance[0].tolist()
        return _told(_none_if_nan(score), _none_if_nan(variance), log_extra)

    rewards.__name__ = name or (objective if objective != "vanilla" else "reward")
    return rewards


def with_variances(function: Callable[..., tuple[Rewards, Rewards]]) -> RewardFunction:
    """Make a reward function of TRL from one that returns rewards and their variances.

    Args:
        function: takes what TRL's reward functions take, and returns two lists, `(rewards, variances)`;
            None where a completion could not be judged. It may be a coroutine.

    The reward function raises a ValueError where it gets something else, such as a pair for each
    completion.
    """

    def split(both: Any, log_extra: Any) -> Rewards:
        pair = isinstance(both, tuple) and len(both) == 2
        if not pair or any(isinstance(one, tuple) or not hasattr(one, "__len__") for one in both):
            raise ValueError(
                f"{function.__name__}: expected two lists, (rewards, variances), got {both!r:.80}"
            )
        found, variances = both
        return _told(found, variances, log_extra)

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def later(*args: Any, **columns: Any) -> Rewards:
            return split(await function(*args, **columns), columns.get("log_extra"))

        return later

    @wraps(function)
    def rewards(*args: Any, **columns: Any) -> Rewards:
        return split(function(*args, **columns), columns.get("log_extra"))

    return rewards


def _told(rewards: Sequence[Any], variances: Sequence[Any], log_extra: Any) -> Rewards:
    """Return rewards as TRL wants them, after logging their variances, which its trainers check.

    Raises:
        ValueError: there are more of one than of the other, or a reward is no number, or infinite.
    """
    if len(rewards) != len(variances):
        raise ValueError(
            f"variances: expected one for each of {len(rewards)} rewards, got {len(variances)}"
        )
    checked = [None if value is None else _checked(k, value) for k, value in enumerate(rewards)]
    if log_extra is not None:
        log_extra(VARIANCE, list(variances))
    return checked


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


def text_of(messages: Any, prompt: bool = False) -> str:
    """Return a prompt or completion as text: as it is, or all its messages (see `prompt_text`).

    Raises:
        ValueError: a message says nothing, or has other parts than text.
    """
    if isinstance(messages, str):
        return messages
    return prompt_text(messages) if prompt else dialogue_text(messages)


def _uniforms(seed: int, step: int, prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """Return a number in [0, 1) for each text (texts,), whatever else is judged.

    A run that is resumed at a step draws the same again; of equal texts each has its own number, also
    where they are on different processes.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    seen: Counter[tuple[str, str]] = Counter()
    numbers = []
    for text in zip(prompts, responses, strict=True):
        seen[text] += 1
        what = (seed, step, seen[text], text, *([rank] if rank else []))
        digest = hashlib.sha256(repr(what).encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "big") / 2**64)
    return np.array(numbers)


def _of(judgement: Judgement, variance_of: VarianceOf | None) -> Judgement:
    if not isinstance(judgement, Members | Interval):
        raise ValueError(
            f"source: expected Members or Interval, got {type(judgement).__name__} from judge()"
        )
    if variance_of is None:
        return judgement
    if isinstance(judgement, Interval):
        raise ValueError("variance_of: an interval has no members; leave it out")
    return Members(judgement.scores, variance_of)


def _row(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))[None]


def _checked(place: int, reward: Any) -> float:
    if isinstance(reward, str | bytes | bool) or np.isinf(reward):
        raise ValueError(
            f"rewards: completion {place} has {reward!r}; expected a finite number, or None for none"
        )
    return float(reward)


def _none_if_nan(values: list[float]) -> list[float | None]:
    return [None if value != value else value for value in values]
