"""The method in TRL's trainers: RLOO and GRPO with a penalty times each completion's variance."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from vaalign_lib.data.messages import dialogue_text, prompt_text
from vaalign_lib.rewards.base import (
    Array,
    Interval,
    Judgement,
    Members,
    RewardSource,
    Unit,
    VarianceOf,
    check_variance_of,
)
from vaalign_lib.training.objectives import OBJECTIVES, Outcome

VARIANCE = "reward_variance"  # the column that a reward function logs
LARGEST = 1e18  # variance: its square, as norms of gradients have it, is still a number in float32
GIVEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # by trl, to rewards
Penalty = Literal["detached", "exact"]
_MADE = "variances would be lost. These trainers were made for trl>=1.16,<1.17"


class VarianceError(ValueError):
    """A completion without a variance, or with one that is not a finite number of at least 0."""


class IncompatibleTrlError(RuntimeError):
    """A release of TRL does not do what these trainers rely on."""


class _VarianceAware:
    """What both trainers share: they ask for variances when rewards are computed."""

    def __init__(self, *args: Any, penalty: Penalty = "detached", **options: Any) -> None:
        """Begin as the stock trainer does; `detached` is a penalty as a reward, as in the paper's code,
        `exact` one with the gradient of Equation (5), which costs each completion beta sigma^2 once more.
        """
        if penalty not in get_args(Penalty):
            raise ValueError(f"penalty: expected one of {', '.join(get_args(Penalty))}, got {penalty!r}")
        self.penalty = penalty
        if (given := options.get("args")) is not None:
            self._check(given)  # before a large model is loaded
        super().__init__(*args, **options)
        self._check(self.args)  # type: ignore[attr-defined]
        for name in ("train_dataset", "eval_dataset"):
            check_columns(name, getattr(self, name))
        self.beta: float = float(self.beta)  # type: ignore[has-type]
        self._variances: Tensor | None = None

    def _check(self, settings: Any) -> None:
        if not 0 < settings.beta < float("inf"):
            raise ValueError(
                "args.beta: a penalty that grows with the variance needs a finite coefficient above 0, "
                f"got {settings.beta}"
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, *further: Any) -> Tensor:
        """Return what the stock trainer does (completions of all processes, reward functions), and keep
        the variances of all processes (completions,). A completion whose variance is None is left out.
        """
        pending = self._pending_extra_logs  # type: ignore[attr-defined]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, *further)  # type: ignore[misc]
        rewarded = ~rewards[self._mine(len(prompts))].isnan().all(dim=1)  # (completions,)
        try:
            logged = summed(pending.get(VARIANCE), len(prompts), self.reward_weights.tolist())  # type: ignore[attr-defined]
            own = checked_variances(logged, rewarded.tolist())
        except VarianceError:
            pending.clear()
            raise
        if len(pending[VARIANCE]) != len(own):  # of several functions; trl's table has one a completion
            pending[VARIANCE][:] = own
        known = [one for one in own if one is not None]
        self._log_metric(f"{VARIANCE}/mean", sum(known) / max(len(known), 1))  # type: ignore[attr-defined]
        local = rewards.new_tensor([np.nan if one is None else one for one in own])
        variances = self.accelerator.gather(local)  # type: ignore[attr-defined]
        rewards[variances.isnan()] = torch.nan
        self._judged = ~variances.isnan()
        self._variances = variances.nan_to_num(0.0)
        return rewards

    def _mine(self, count: int) -> slice:
        """Return the places of this process's completions among those of all."""
        first = int(self.accelerator.process_index) * count  # type: ignore[attr-defined]
        return slice(first, first + count)

    def _known_variances(self) -> Tensor:
        """Return the variances of the completions that were just judged."""
        if self._variances is None:
            raise IncompatibleTrlError(
                f"this release of trl gets no rewards from _calculate_rewards; {_MADE}"
            )
        return self._variances

    @contextmanager
    def _weighing(self, place: str) -> Iterator[None]:
        """Check that rows were weighed once inside, and then let the coefficient be a number again."""
        try:
            yield
        finally:
            weighed, self.beta = self.beta, float(self.beta)
        self._known_variances()
        products = getattr(weighed, "products", 0)
        if products != 1:
            raise IncompatibleTrlError(
                f"{place} multiplies the KL by self.beta {products} times, not once, in this release of "
                f"trl; {_MADE}"
            )


class VarianceAwareRLOOTrainer(_VarianceAware, RLOOTrainer):
    """TRL's RLOO with rewards R - beta sigma^2 ln(pi / pi_0), or that minus beta sigma^2."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        once = self.penalty == "exact"
        self.beta = _Weighing(float(self.beta), self._known_variances(), axes=1, once=once)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._variances = None
        with self._weighing("RLOOTrainer._generate_and_score_completions"):
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return batch


class VarianceAwareGRPOTrainer(_VarianceAware, GRPOTrainer):
    """TRL's GRPO with beta sigma^2 times the KL in its loss, or with that and advantages that pay
    beta sigma^2; variances travel with their rows.
    """

    def _check(self, settings: Any) -> None:
        super()._check(settings)
        if self.penalty == "exact" and not settings.use_bias_correction_kl:
            raise ValueError(
                "penalty: GRPO's KL without its correction follows another gradient than that "
                "of Equation (5); for 'exact' set use_bias_correction_kl=True in GRPOConfig"
            )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._variances = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mine = self._mine(len(batch["advantages"]))
        batch[VARIANCE] = self._known_variances()[mine]
        if self.penalty == "exact":
            batch["advantages"] = batch["advantages"] - self.beta * self._excess()[mine]
        return batch

    def _excess(self) -> Tensor:
        """Return by how much each variance is above the mean of the others of its group, 0 for what was
        not judged, or alone was (completions of all processes,).
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = self._known_variances().view(-1, size)  # (groups, size)
        counted = self._judged.view(-1, size)  # (groups, size)
        others = counted.sum(1, keepdim=True) - 1  # (groups, 1)
        mean = (groups.sum(1, keepdim=True) - groups) / others.clamp(min=1)  # not judged is 0
        return ((groups - mean) * (counted & (others > 0))).view(-1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.beta = _Weighing(float(self.beta), inputs[VARIANCE], axes=2)
        with self._weighing("GRPOTrainer._compute_loss"):
            loss: Tensor = super()._compute_loss(model, inputs)
        return loss


def summed(logged: Any, completions: int, weights: list[float]) -> Any:
    """Return what reward functions logged, one after the other; of several the sum for each completion,
    as the variances of independent rewards add. What one of them could not judge has none (completions,).
    """
    times = len(logged or ()) // max(completions, 1)
    if not 1 < times <= len(weights) or len(logged) != times * completions:
        return logged
    if any(weight != 1 for weight in weights):
        raise VarianceError(
            f"{VARIANCE}: logged by {times} reward functions, which have the weights {weights}; with "
            "reward_weights let one function log the variance of the weighted sum"
        )
    each = zip(*(logged[k * completions : (k + 1) * completions] for k in range(times)), strict=True)
    return [None if None in row else sum(map(_number, row)) for row in each]


def checked_variances(logged: Any, rewarded: list[bool]) -> list[float | None]:
    """Return the variance of every completion, None where it is to be left out, or has no reward.

    Raises:
        VarianceError: they are missing, or one is not a number from 0 to `LARGEST`.
    """
    if logged is None:
        raise VarianceError(
            f"{VARIANCE}: no reward function logged it; call log_extra('{VARIANCE}', variances) in one, "
            "or wrap one by with_variances"
        )
    values = list(logged)
    if len(values) != len(rewarded):
        raise VarianceError(
            f"{VARIANCE}: expected one for each of {len(rewarded)} completions, got {len(values)}; a "
            "reward function logs them once"
        )
    found = [value if counts else None for value, counts in zip(values, rewarded, strict=True)]
    for k, value in enumerate(found):
        if value is not None and not 0 <= _number(value) <= LARGEST:
            raise VarianceError(
                f"{VARIANCE}: completion {k} of {len(values)} has {value!r}; expected a finite number "
                f"from 0 to {LARGEST:g}, or None to leave this completion out"
            )
    return [None if value is None else float(value) for value in found]


def _number(value: Any) -> float:
    """Return a number, or NaN for what is none, such as a text."""
    try:
        return float("nan") if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def check_columns(name: str, data: Any) -> None:
    """Refuse a column of a data set that takes the place of what TRL gives to reward functions."""
    for one in data.values() if isinstance(data, dict) else [data]:
        taken = sorted(set(getattr(one, "column_names", None) or ()) & set(GIVEN))
        if taken:
            raise ValueError(
                f"{name}: the column {taken[0]} has the name of something that trl gives to reward "
                "functions; rename it"
            )


class _Weighing(float):
    """A coefficient that is a number, and multiplies the rows of a tensor by weights of their own."""

    weights: Tensor
    axes: int
    once: bool
    products: int

    def __new__(cls, value: float, weights: Tensor, axes: int, once: bool = False) -> "_Weighing":
        """Make one of weights (rows,) for a tensor of so many axes; with `once` a row's weight counts once
        more beside what it multiplies.
        """
        number = super().__new__(cls, value)
        number.weights, number.axes, number.once, number.products = weights, axes, once, 0
        return number

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        if other.dim() != self.axes or len(other) != len(self.weights):
            raise IncompatibleTrlError(
                f"trl multiplies its coefficient by a tensor of shape {tuple(other.shape)}, not by one "
                f"with {self.axes} axes and {len(self.weights)} rows; {_MADE}"
            )
        self.products += 1
        weights = self.weights.view(-1, *[1] * (other.dim() - 1))
        return float(self) * (weights * (other + 1 if self.once else other))

    __rmul__ = __mul__


# --- reward functions -----------------------------------------------------------------------------------

WITH_WEIGHTS = ("variance_aware", "variance_aware_exact")  # more than a change of reward: the trainers'
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
        objective: one of `objectives.OBJECTIVES` that is a change of reward only.
        strength: of the objective.
        unit: of rewards and variances, by default their own; see `reference_unit`.
        variance_of: of an ensemble a single `member` or the `mean`, which the unit should share.
        policy: its number, for sources of which each policy has its own.
        seed: of the draws from intervals; they also depend on the step, the text and the process.
        name: under which TRL logs the rewards, by default the objective's; of two functions each its own.
    """
    _check_objective(objective, strength)
    if variance_of is not None:
        check_variance_of(variance_of)
    known = name or (objective if objective != "vanilla" else "reward")
    return _Asking(source, objective, strength, unit or Unit(), variance_of, policy, seed, known)


@dataclass
class _Asking:
    """A reward function of TRL; it can be pickled where its source can, as AsyncGRPO asks."""

    source: RewardSource
    objective: str
    strength: float
    unit: Unit
    variance_of: VarianceOf | None
    policy: int
    seed: int
    __name__: str  # under which trl logs

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        trainer_state: Any = None,
        log_extra: Any = None,
        **_: Any,
    ) -> Rewards:
        asked = [text_of(one, prompt=True) for one in prompts]
        answers = [text_of(one) for one in completions]
        judgement = self.source.judge(asked, answers, np.full(len(asked), self.policy))
        judgement = _of(judgement, self.variance_of)
        if judgement.variance().shape != (len(answers),):
            raise ValueError(
                f"source: expected a judgement of each of {len(answers)} completions, got "
                f"{judgement.variance().size}"
            )
        step = int(getattr(trainer_state, "global_step", 0))
        draws = _uniforms(self.seed, step, asked, answers)
        strengths = np.full(len(asked), self.strength)
        said = np.array(self.unit.of_judgement(judgement, draws, strengths), dtype=np.float64)  # (4, B)
        outcome = Outcome(*torch.from_numpy(said)[:, None])
        no_beta, one_strength = torch.zeros(1, 1), torch.full((1, 1), self.strength)
        score = OBJECTIVES[self.objective](outcome, no_beta, one_strength).score[0]  # (B,)
        both = _none_if_nan(score), _none_if_nan(outcome.variance[0])
        return _split(self.__name__, both, log_extra)


def _check_objective(objective: str, strength: float) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective in WITH_WEIGHTS:
        raise ValueError(
            f"objective: {objective} weighs the KL penalty; leave it out here and take a variance-aware "
            "trainer of vaalign_lib.training.trl"
        )
    most = 1 if objective == "reward_robust" else LARGEST
    if not 0 <= strength <= most:
        raise ValueError(f"strength: expected 0 to {most:g} for {objective}, got {strength}")


def with_variances(function: Callable[..., tuple[Rewards, Rewards]]) -> RewardFunction:
    """Make a reward function of TRL from one that returns rewards and their variances.

    Those are two lists, `(rewards, variances)`, with None where a completion could not be judged; anything
    else is refused, such as a pair for each completion. It may be a coroutine. Trainers check variances.
    """
    name = function.__name__
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def later(*args: Any, **columns: Any) -> Rewards:
            return _split(name, await function(*args, **columns), columns.get("log_extra"))

        return later

    @wraps(function)
    def rewards(*args: Any, **columns: Any) -> Rewards:
        return _split(name, function(*args, **columns), columns.get("log_extra"))

    return rewards


def _split(name: str, both: Any, log_extra: Any) -> Rewards:
    """Return the rewards of rewards and variances, and log the latter."""
    pair = isinstance(both, tuple) and len(both) == 2
    if not pair or any(isinstance(one, tuple) or not hasattr(one, "__len__") for one in both):
        raise ValueError(f"{name}: expected two lists, (rewards, variances), got {both!r:.80}")
    found, variances = both
    if len(found) != len(variances):
        raise ValueError(f"variances: expected one for each of {len(found)} rewards, got {len(variances)}")
    checked = [None if value is None else _checked(k, value) for k, value in enumerate(found)]
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
    """Return a prompt or completion as text: as it is, or all its messages (see `prompt_text`)."""
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
        raise ValueError(f"source: expected Members or Interval, got {type(judgement).__name__} from judge()")
    if variance_of is None:
        return judgement
    if isinstance(judgement, Interval):
        raise ValueError("variance_of: an interval has no members; leave it out")
    return Members(judgement.scores, variance_of)


def _checked(place: int, reward: Any) -> float:
    if isinstance(reward, str | bytes | bool) or np.isinf(reward):
        raise ValueError(
            f"rewards: completion {place} has {reward!r}; expected a finite number, or None for none"
        )
    return float(reward)


def _none_if_nan(values: Tensor) -> Rewards:
    return [None if value != value else value for value in values.tolist()]
