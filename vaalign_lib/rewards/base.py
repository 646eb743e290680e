"""What every source of rewards hands out (Algorithm 6): one judgement of a response, which gives the sampled
reward (Algorithm 7) and its variance (Algorithm 8); the source knows the true reward (Algorithm 9).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Array = NDArray[np.float64]
PolicyIndex = NDArray[np.int64]
VarianceOf = Literal["member", "mean"]
WEAKEST = 1e-6  # strength of a certainty equivalent that stands for none: its limit is the mean


def _check_numbers(name: str, values: Any) -> None:
    """Check that a judgement is an array of finite numbers; NaN stands for what could not be judged."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"{name}: expected an array of real numbers, got {kind}")
    if (infinite := np.argwhere(np.isinf(values))).size:
        raise ValueError(
            f"{name}: a source answers with finite numbers, or NaN for what it could not judge, got an "
            f"infinite one for response {infinite[0][0]}"
        )


def check_variance_of(name: str) -> None:
    """Check that this names a variance."""
    if name not in get_args(VarianceOf):
        raise ValueError(f"variance_of: expected member or mean, got {name!r}")


def _check_weights(weights: Array | None, shape: tuple[int, ...]) -> None:
    if weights is None:
        return
    _check_numbers("weights", weights)
    if weights.shape != shape or (weights < 0).any():
        raise ValueError(f"weights: expected numbers {shape} from 0 on, got {weights.shape}")


@dataclass(frozen=True)
class Members:
    """The scores of the members of an ensemble (responses, members).

    The variance is of a single `member`, as the paper has it although its reward is their mean; or of the
    `mean`, that divided by the number of members.
    `weights` (responses,) are of the penalty, where they are not the variance.
    """

    scores: Array
    variance_of: VarianceOf = "member"
    weights: Array | None = None

    def __post_init__(self) -> None:
        _check_numbers("scores", self.scores)
        if self.scores.ndim != 2 or self.scores.shape[1] < 2:
            raise ValueError(f"scores: expected (responses, at least two members), got {self.scores.shape}")
        check_variance_of(self.variance_of)
        _check_weights(self.weights, self.scores.shape[:1])

    def sample(self, uniforms: Array) -> Array:
        """Return the reward (responses,): the members' mean, whatever the uniforms."""
        return np.asarray(self.scores.mean(1))

    def variance(self) -> Array:
        """Return the sample variance (responses,), ddof=1."""
        spread = self.scores.var(1, ddof=1)
        return np.asarray(spread / self.scores.shape[1] if self.variance_of == "mean" else spread)

    def weight(self) -> Array:
        """Return what the penalty is multiplied with (responses,): the variance if nothing else is said."""
        return self.variance() if self.weights is None else self.weights

    def worst(self) -> Array:
        """Return the lowest member's score (responses,)."""
        return np.asarray(self.scores.min(1))

    def soft_worst(self, strength: Array) -> Array:
        """Return -ln mean(exp(-strength * score)) / strength over the members (responses,)."""
        strength = np.maximum(strength, WEAKEST)
        scaled = -strength[:, None] * self.scores
        return np.asarray(-(logsumexp(scaled, axis=1) - np.log(self.scores.shape[1])) / strength)


@dataclass(frozen=True)
class Interval:
    """What a prompted judge answers: likely rewards between a and b, the bounds (responses, 2).

    A persistent judge's own rewards lie at the quantiles (responses,); without them, in the paper's protocol,
    every query is a fresh draw.
    `weights` (responses,) are of the penalty, where they are not the variance.
    """

    bounds: Array
    quantiles: Array | None = None
    weights: Array | None = None

    def __post_init__(self) -> None:
        _check_numbers("bounds", self.bounds)
        if self.bounds.ndim != 2 or self.bounds.shape[1] != 2:
            raise ValueError(f"bounds: expected (responses, 2), got {self.bounds.shape}")
        if (self.bounds[:, 0] > self.bounds[:, 1]).any():
            raise ValueError("bounds: expected a <= b in every row")
        if self.quantiles is not None:
            _check_numbers("quantiles", self.quantiles)
            if self.quantiles.shape != self.bounds.shape[:1]:
                raise ValueError(f"quantiles: expected {self.bounds.shape[:1]}, got {self.quantiles.shape}")
            if ((self.quantiles < 0) | (self.quantiles > 1)).any():
                raise ValueError("quantiles: expected numbers from 0 to 1")
        _check_weights(self.weights, self.bounds.shape[:1])

    def sample(self, uniforms: Array) -> Array:
        """Return the reward (responses,): a draw from U[a, b], or the judge's own."""
        place = uniforms if self.quantiles is None else self.quantiles
        return np.asarray(self.bounds[:, 0] + place * np.diff(self.bounds)[:, 0])

    def variance(self) -> Array:
        """Return the variance of U[a, b] (responses,): (b - a)^2 / 12."""
        return np.asarray(np.diff(self.bounds)[:, 0] ** 2 / 12)

    def weight(self) -> Array:
        """Return what the penalty is multiplied with (responses,): the variance if nothing else is said."""
        return self.variance() if self.weights is None else self.weights

    def midpoint(self) -> Array:
        """Return (a + b) / 2 (responses,)."""
        return np.asarray(self.bounds.mean(1))

    def worst(self) -> Array:
        """Return a (responses,)."""
        return self.bounds[:, 0]

    def soft_worst(self, strength: Array) -> Array:
        """Return -ln E[exp(-strength * r)] / strength for r from U[a, b] (responses,)."""
        strength = np.maximum(strength, WEAKEST)
        half = strength * np.diff(self.bounds)[:, 0] / 2
        safe = np.maximum(half, 1e-4)  # below that the first term of the series is exact
        log_mean = np.where(half < 1e-4, half**2 / 6, safe + np.log(-np.expm1(-2 * safe) / (2 * safe)))
        return self.midpoint() - log_mean / strength


Judgement = Members | Interval
Truth = Callable[[Sequence[str], Sequence[str]], Array]  # prompts, responses -> true rewards


class RewardSource(Protocol):
    """A source of rewards; everything downstream sees only this."""

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Judgement:
        """Judge responses, all three (responses,); `policy`, the global index of who wrote each, picks one
        of several judges or ensembles where every policy has its own.
        """

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,)."""


@dataclass(frozen=True, kw_only=True)
class ScoreSource:
    """Rewards by the members of an ensemble; kinds of ensembles differ in how these score."""

    truth: Truth | None = None
    variance_of: VarianceOf = "member"

    def __post_init__(self) -> None:
        check_variance_of(self.variance_of)

    def scores(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Array:
        """Return the members' scores (responses, members)."""
        raise NotImplementedError

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Members:
        """Score responses by every member of the ensemble."""
        return Members(self.scores(prompts, responses, policy), self.variance_of)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,), whatever the judgement."""
        if self.truth is None:
            raise ValueError("truth: this ensemble was made without a true reward; give it one")
        return self.truth(prompts, responses)


class IntervalSource:
    """Rewards by a judge that answers with intervals; the true reward is their middle (Algorithm 9)."""

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the middle of the interval (responses,)."""
        if not isinstance(judgement, Interval):
            raise TypeError("judgement: expected the interval of this judge")
        return judgement.midpoint()


SAME = 1e-12  # of the largest reward: a deviation below that is rounding


@dataclass(frozen=True)
class Unit:
    """What rewards, less a location, and variances are divided by before an objective sees them."""

    location: float = 0.0
    scale: float = 1.0
    variance: float = 1.0

    @classmethod
    def of(cls, rewards: Array, variances: Array) -> "Unit":
        """Return the unit in which these have mean 0 and deviation 1, and variances mean 1 or stay 0."""
        if len(rewards) < 2 or not (np.isfinite(rewards).all() and np.isfinite(variances).all()):
            raise ValueError(f"source: expected two or more finite rewards and variances, got {len(rewards)}")
        scale = float(rewards.std())
        if not scale > SAME * float(np.abs(rewards).max()):
            raise ValueError(
                "source: over the reference policy's responses its rewards are all the same; give "
                "Method(standardized=False) to train with them as they are"
            )
        return cls(float(rewards.mean()), scale, float(variances.mean()) or 1.0)

    def of_judgement(
        self, judgement: Judgement, uniforms: Array, strength: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Return what a judgement says, in this unit (responses,) each, in the order of `Outcome`."""
        soft_worst = judgement.soft_worst(strength / self.scale)
        raw = (judgement.sample(uniforms), judgement.worst(), soft_worst)
        reward, worst, soft_worst = ((one - self.location) / self.scale for one in raw)
        return reward, judgement.weight() / self.variance, worst, soft_worst
