"""Annotators who rate attributes of the embedded world's texts: the attribute, a taste, an answer's noise.

So the variance of a rating is known exactly. Ratings are neither rounded nor cut off at the scale's ends.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vaalign_lib.data.world.attributes import ATTRIBUTES, STYLES
from vaalign_lib.data.world.world import ANNOTATORS, Array, Texts, World

# standard deviation over annotators of what a corpus deviation of each style adds to a rating, by attribute
TASTES = {  # flattery, hedging, imagery, exclamation, length
    "helpfulness": (0.40, 0.20, 0.10, 0.10, 0.20),
    "correctness": (0.10, 0.45, 0.10, 0.10, 0.10),
    "coherence": (0.05, 0.10, 0.20, 0.45, 0.10),
    "complexity": (0.05, 0.10, 0.45, 0.05, 0.25),
    "verbosity": (0.05, 0.10, 0.10, 0.10, 0.50),
}
NOISE = 0.5  # an answer's standard deviation, over the temperature of the prompt's labels


@dataclass(frozen=True)
class AttributeRaters:
    """The annotators of a world as raters of its five attributes."""

    world: World

    @cached_property
    def tastes(self) -> Array:
        """What a corpus deviation of a style adds to a rating (annotators, attributes, styles), of mean 0."""
        spread = np.array([TASTES[name] for name in ATTRIBUTES])
        drawn = self.world.rng("attribute tastes").normal(0, spread, (ANNOTATORS, *spread.shape))
        return drawn - drawn.mean(0)

    def moments(self, prompts: Texts, responses: Texts) -> tuple[Array, Array]:
        """Return the mean and the variance of one rating by anybody, (count, attributes) each."""
        means, styles, noise = self._read(prompts, responses)
        covariance = np.einsum("aki,akj->kij", self.tastes, self.tastes) / ANNOTATORS
        taste = np.einsum("bi,kij,bj->bk", styles, covariance, styles)
        return means, taste + noise[:, None] ** 2

    def ratings(self, prompts: Texts, responses: Texts, each: int, random: np.random.Generator) -> Array:
        """Let so many annotators, drawn for each text, rate its attributes (count, each, attributes)."""
        means, styles, noise = self._read(prompts, responses)
        who = random.integers(ANNOTATORS, size=(len(means), each))
        taste = np.einsum("brki,bi->brk", self.tastes[who], styles)
        return means[:, None] + taste + noise[:, None, None] * random.standard_normal(taste.shape)

    def _read(self, prompts: Texts, responses: Texts) -> tuple[Array, Array, Array]:
        """Return attributes, styles in corpus deviations (count, 5 each), and an answer's noise (count,)."""
        attributes = self.world.assess(prompts, responses)[list(ATTRIBUTES)].to_numpy(dtype=float)
        styles = self.world.features(prompts, responses)[:, len(ATTRIBUTES) :][:, : len(STYLES)]
        return attributes, styles, NOISE * self.world.temperature(prompts)
