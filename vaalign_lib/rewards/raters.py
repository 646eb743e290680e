"""Rewards from people's ratings of single words: a policy is rewarded for words that people rate highly.

Several people rated each word. Each policy knows, of every word, the rating of one of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import punctuation

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vaalign_lib.rewards.base import Array, Interval, Judgement, PolicyIndex

Whole = NDArray[np.int64]
AS_USED, ALIKE = 50, 5  # words of like use; among them words of like mean, whose variances are exchanged


@dataclass(frozen=True)
class HeardWords:
    """A response's reward is the mean rating of its known words, those that people rated; 0 (neutral) if it
    has none. Words do not change each other: "not good" is as good as "good".

    For each word a policy is given one person, drawn at random once, and always takes that person's rating:
    the `independent` protocol. The true reward takes the mean rating of all people. The stated variance is
    that of drawing one person for each word, independently, among those who were asked (so ddof=0); it is
    exactly the variance of the reward over policies, whose mean is the true reward.
    """

    words: pd.DataFrame  # see `data.raters`: `text`, in lower case, and `ratings`
    seed: int

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses, each by what the policy that wrote it has heard: the middle of an interval as wide
        as people differ.
        """
        rows, known, weights = self._counted(responses)
        policies, which = np.unique(policy, return_inverse=True)
        drawn = [self.people(int(one)) for one in policies]
        people = np.array(drawn, dtype=np.int64).reshape(len(policies), len(self.words))
        heard = self._ratings[known, people[which[rows], known]]
        middle = np.bincount(rows, weights * heard, len(responses))
        half = np.sqrt(3 * self.spread(responses, self.moments[1]))
        return Interval(np.stack([middle - half, middle + half], axis=1), np.full(len(responses), 0.5))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the mean over all people (responses,)."""
        rows, known, weights = self._counted(responses)
        return np.asarray(np.bincount(rows, weights * self.moments[0][known], len(responses)), dtype=float)

    def spread(self, responses: Sequence[str], variances: Array) -> Array:
        """Return the variance of responses whose words have these variances (responses,)."""
        rows, known, weights = self._counted(responses)
        return np.asarray(np.bincount(rows, weights**2 * variances[known], len(responses)), dtype=float)

    def uses(self, responses: Sequence[str]) -> Whole:
        """Return how often responses use each word (words,)."""
        places = [place for text in responses for place in self.known_words(text)]
        return np.bincount(np.array(places, dtype=np.int64), minlength=len(self.words))

    def people(self, policy: int) -> Whole:
        """Return whom a policy hears for each word, by place in its ratings (words,)."""
        return np.random.default_rng([self.seed, policy]).integers(self.words["people"].to_numpy())

    def known_words(self, text: str) -> Iterator[int]:
        """Yield the places of a text's known words: as they stand there, else without punctuation around."""
        for word in text.lower().split():
            place = self._places.get(word, self._places.get(word.strip(punctuation)))
            if place is not None:
                yield place

    def _counted(self, responses: Sequence[str]) -> tuple[Whole, Whole, Array]:
        """Return of every known word of every response, each once: response, word, and its share of them."""
        pairs = [(row, place) for row, text in enumerate(responses) for place in self.known_words(text)]
        found, times = np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0, return_counts=True)
        rows, known = found.T
        return rows, known, times / np.bincount(rows, times, len(responses))[rows]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words["text"])}

    @cached_property
    def _ratings(self) -> Array:
        """The ratings (words, people), NaN where fewer people were asked."""
        table = np.full((len(self.words), self.words["people"].max()), np.nan)
        for row, ratings in zip(table, self.words["ratings"], strict=True):
            row[: len(ratings)] = ratings
        return table

    @cached_property
    def moments(self) -> tuple[Array, Array]:
        """The mean and variance, ddof=0, over the people who rated each word (words,)."""
        return np.nanmean(self._ratings, axis=1), np.nanvar(self._ratings, axis=1)


@dataclass(frozen=True)
class ExchangedWords:
    """A placebo for `HeardWords`: the same rewards, but the weights of the penalty are computed from words'
    variances that were exchanged at random, among words that the reference policy uses about as often and
    that people rate about as high.

    So the weights keep their distribution, become smaller with more known words and go with the true reward
    as before, but no longer say on which words people disagree.
    """

    source: HeardWords
    used: Whole  # how often the reference policy uses each word (words,)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses as the source does, with the placebo's weights."""
        weights = self.source.spread(responses, self.variances)
        return replace(self.source.judge(prompts, responses, policy), weights=weights)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the source's true reward (responses,)."""
        return self.source.true_reward(judgement, prompts, responses)

    @cached_property
    def variances(self) -> Array:
        """The words' exchanged variances (words,)."""
        random = np.random.default_rng([self.source.seed, len(self.used)])
        means, own = self.source.moments
        found = own.copy()
        order = np.lexsort((random.random(len(own)), -self.used))
        for first in range(0, len(order), AS_USED):
            part = order[first : first + AS_USED]
            part = part[np.argsort(means[part], kind="stable")]
            for group in (part[k : k + ALIKE] for k in range(0, len(part), ALIKE)):
                circle = random.permutation(group)  # nobody keeps its own: on average uncorrelated
                found[circle] = own[np.roll(circle, 1)]
        return found
