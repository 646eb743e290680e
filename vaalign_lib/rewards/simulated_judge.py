"""Stand-ins for the paper's prompted judges in the embedded world, and judges that stay themselves.

A stand-in answers with the interval that has the mean and the variance of the world's annotators, on a
scale from 1 to R. Three of them differ in what they like beside quality, in level, in how widely they answer,
and in how smoothly a judge of their kind varies over texts. None is a language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from vaalign_lib.data.world.world import SHARED_TASTE, World
from vaalign_lib.rewards.base import Array, Interval, IntervalSource, Judgement, PolicyIndex, RewardSource
from vaalign_lib.statistics.arrays import count, number

Features = Callable[[Sequence[str], Sequence[str]], Array]  # prompts, responses -> (responses, width)
UNIT = 0.12  # of the scale's length per standard deviation of the gold reward


@dataclass(frozen=True)
class SimulatedJudge(IntervalSource):
    """A judge that speaks for the annotators of an embedded world: its interval on a scale from 1 to R, the
    `highest`, has their mean and variance.
    """

    world: World
    name: str
    level: float = 0.0  # by how much of the scale it judges higher than the middle
    width: float = 1.0  # its interval's standard deviation in units of the annotators'
    taste: tuple[float, ...] = SHARED_TASTE  # for styles, beside the gold reward
    length_scale: float = 2.0  # of features, over which a judge's own taste changes
    highest: float = 100.0
    stretch: float = 1.0  # of the widths around their mean over the corpus

    def __post_init__(self) -> None:
        number("highest", self.highest, above=1)
        number("level", self.level)
        number("width", self.width, at_least=0)
        number("stretch", self.stretch, at_least=0)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses; what would leave the scale is cut off at its ends."""
        span = self.highest - 1
        mean = self.world.consensus(prompts, responses, self.taste)
        deviation = np.sqrt(self.world.disagreement_variance(prompts, responses))
        if self.stretch != 1:
            middle = self.world.mean_deviation
            deviation = np.maximum(middle + self.stretch * (deviation - middle), 0)
        centre = 1 + span * (0.5 + self.level + UNIT * mean)
        half = np.maximum(np.sqrt(3) * self.width * span * UNIT * deviation, 0.001 * span)
        low = np.clip(centre - half, 1, self.highest - 0.002 * span)
        high = np.clip(centre + half, low + 0.002 * span, self.highest)
        return Interval(np.stack([low, high], axis=1))


def stand_ins(world: World, highest: float = 100.0, stretch: float = 1.0) -> dict[str, SimulatedJudge]:
    """Return the three stand-ins by name; the names say for which judge of the paper each stands."""
    settings = {
        "stand-in for Gemini 1.5 Flash": (0.0, 1.0, (0.3, -0.05, 0.25, 0.0, -0.1), 1.2),
        "stand-in for Gemini 2.0 Flash": (0.08, 1.5, SHARED_TASTE, 2.0),
        "stand-in for DeepSeek V3": (-0.05, 0.7, (-0.15, 0.2, 0.0, 0.1, 0.35), 4.0),
    }
    return {name: SimulatedJudge(world, name, *one, highest, stretch) for name, one in settings.items()}


@dataclass(frozen=True)
class PersistentJudges:
    """One judge per policy, drawn once: the `independent` protocol for a source's intervals.

    Judge j's reward for a text lies at the quantile Phi(Z_j(text)) of the interval. Z_j is a Gaussian
    field with mean 0 and variance 1 at every text, smooth over text features (random Fourier features of
    the squared-exponential kernel), so over judges the reward is U[a, b] with variance (b - a)^2 / 12,
    and one judge rates like texts alike.
    """

    source: RewardSource
    features: Features
    seed: int
    length_scale: float = 2.0  # distance of features over which a judge's taste changes
    frequencies: int = 256  # of the Fourier features

    def __post_init__(self) -> None:
        number("length_scale", self.length_scale, above=0)
        count("frequencies", self.frequencies)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses, each by the judge of the policy that wrote it."""
        judgement = self.source.judge(prompts, responses, policy)
        if not isinstance(judgement, Interval):
            raise TypeError("source: expected one that answers with intervals")
        features = self.features(prompts, responses)
        random = np.random.default_rng([self.seed, 0])
        waves = fourier_features(features, random, self.length_scale, self.frequencies)
        judges, which = np.unique(policy, return_inverse=True)
        tastes = np.stack([self._taste(int(j)) for j in judges])  # (judges, 2 frequencies)
        field = np.einsum("bk,bk->b", waves, tastes[which])  # (responses,)
        return Interval(judgement.bounds, norm.cdf(field))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the source's true reward (responses,)."""
        return self.source.true_reward(judgement, prompts, responses)

    def _taste(self, judge: int) -> Array:
        return np.random.default_rng([self.seed, 1, judge]).standard_normal(2 * self.frequencies)


def fourier_features(
    features: Array, random: np.random.Generator, length_scale: float, frequencies: int
) -> Array:
    """Return unit vectors (responses, 2 frequencies) whose products are nearly the squared-exponential kernel
    (Rahimi and Recht, 2007): weights from N(0, I) make a smooth Gaussian field of them.
    """
    directions = random.standard_normal((features.shape[1], frequencies))
    angles = features @ directions / length_scale  # (responses, frequencies)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(frequencies)
