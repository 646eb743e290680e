"""Placebo weights: drawn without the judge's errors, with the variance's distribution and smoothness.

A penalty with the true variance spends its KL elsewhere than one with even weights does, whatever the
variance says of the error. What it does beyond a placebo comes from what the variance says of the judge's
errors, its noise and the shared bias that it is correlated with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.stats import norm, rankdata

from vaalign_lib.data.world.language import NOUNS
from vaalign_lib.data.world.world import World
from vaalign_lib.rewards.base import Array, Judgement, PolicyIndex, RewardSource
from vaalign_lib.rewards.simulated_judge import fourier_features

TEXTS = (1500, 8)  # prompts and responses to each that the placebo is fitted on
LENGTH_SCALE, FREQUENCIES = 2.0, 256  # of its smooth part


@dataclass(frozen=True)
class Placebo:
    """A source whose penalty is weighted by a random field over texts in place of its variance.

    The field is a sum of one number for each subject of prompts and a smooth Gaussian field over features
    of texts, in the shares in which the variance's normal scores vary between and within prompts. Over a
    sample of the corpus both parts are uncorrelated with the variance and correlated with gold as it is:
    where bad texts are those that people disagree on, a weight gains gold without knowing any error. The
    field's ranks are mapped to the variance's own distribution. Rewards, variances and true rewards are
    the source's.

    Attributes:
        source: whose variance it stands for.
        world: that the texts are from.
        seed: of the field; the same for all policies.
    """

    source: RewardSource
    world: World
    seed: int

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Judgement:
        """Judge responses as the source does, with the placebo's weights."""
        return replace(
            self.source.judge(prompts, responses, policy), weights=self.weights(prompts, responses)
        )

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the source's true reward (responses,)."""
        return self.source.true_reward(judgement, prompts, responses)

    def weights(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the weights (responses,)."""
        field, variances, coefficients = self._fitted
        place = np.searchsorted(field, self._parts(prompts, responses) @ coefficients) / field.size
        return np.asarray(np.quantile(variances, place))

    def sample(self) -> tuple[list[str], list[str]]:
        """Return prompts and responses of the corpus, some to each prompt, that the placebo is fitted on."""
        random = self.world.rng("placebo", self.seed)
        count, each = TEXTS
        prompts = np.repeat(self.world.prompts(count, random), each).tolist()
        return prompts, self.world.responses(prompts, random.beta(2, 2, len(prompts)), random)

    @cached_property
    def _fitted(self) -> tuple[Array, Array, Array]:
        """The field and the variances over the sample, each sorted; the coefficients of the parts."""
        texts = self.sample()
        judgement = self.source.judge(*texts, np.zeros(len(texts[0]), dtype=np.int64))
        variances = judgement.variance()
        known = np.stack([_normal_scores(one) for one in (variances, self.world.gold(*texts))])
        parts, subjects = self._parts(*texts), len(NOUNS) + 1
        drawn = np.asarray(np.random.default_rng([self.seed, 2]).standard_normal(parts.shape[1]))
        between, means = _share_between(known[0].reshape(TEXTS)), known.reshape(2, *TEXTS).mean(2)
        with_gold = np.mean(means[0] * means[1])  # of the covariance, the part between prompts
        halves = (
            (slice(subjects), between, with_gold),
            (slice(subjects, None), 1 - between, np.mean(known[0] * known[1]) - with_gold),
        )
        for part, share, covariance in halves:
            centred = parts[:, part] - parts[:, part].mean(0)
            drawn[part] *= np.sqrt(share) / (centred @ drawn[part]).std()
            matrix = known @ centred / len(centred)  # covariances are matrix @ drawn
            drawn[part] += np.linalg.pinv(matrix) @ (np.array([0.0, covariance]) - matrix @ drawn[part])
        return np.sort(parts @ drawn), np.sort(variances), drawn

    def _parts(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return what the field is linear in (responses, subjects + 2 frequencies)."""
        subjects = np.eye(len(NOUNS) + 1)[self.world.subjects(prompts)]
        features = self.world.features(prompts, responses)
        random = np.random.default_rng([self.seed, 0])
        return np.concatenate([subjects, fourier_features(features, random, LENGTH_SCALE, FREQUENCIES)], 1)


def _normal_scores(values: Array) -> Array:
    return np.asarray(norm.ppf((rankdata(values) - 0.5) / values.size))


def _share_between(scores: Array) -> float:
    """Return the share of the variance of scores (prompts, responses) that lies between prompts."""
    within = scores.var(axis=1, ddof=1).mean()
    between = scores.mean(axis=1).var(ddof=1) - within / scores.shape[1]
    return float(np.clip(between / (between + within), 0, 1))
