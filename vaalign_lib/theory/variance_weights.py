"""Weights of the penalty that know a chosen part of where a judge errs, on P prompts' S stored responses with
features of width d; F frequencies of a random field.

All are made by ranks: whatever they know, their values are those of the true variance, so that no two of
them differ in how unequal they are. `placebo` fields are as smooth over texts as the variance is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from vaalign_lib.statistics.arrays import Array, number, numbers

FREQUENCIES = 512  # of a random field's Fourier features


def normal_scores(values: ArrayLike) -> Array:
    """Return the standard normal's quantiles at the values' ranks, of the same shape."""
    array = numbers("values", values)
    ranks = rankdata(array, method="ordinal").reshape(array.shape)
    return norm.ppf((ranks - 0.5) / array.size)


def with_values_of(scores: Array, values: Array) -> Array:
    """Return the values in the order of the scores, of one shape."""
    ranks = rankdata(scores, method="ordinal") - 1  # (P * S,)
    return np.sort(values, axis=None)[ranks.reshape(scores.shape)]


def correlated(variance: ArrayLike, field: Array, rho: float) -> Array:
    """Return weights (P, S) with the variance's values, of which rho is the correlation with it.

    They are F^-1(Phi(rho z + sqrt(1 - rho^2) z_0)), with the variance's normal scores z and a field z_0 of
    unit variance that is orthogonal to them: the variance itself at 1, a placebo at 0.
    """
    number("rho", rho, at_least=-1, at_most=1)
    variance = numbers("variance", variance, above=0)
    return with_values_of(rho * normal_scores(variance) + np.sqrt(1 - rho**2) * field, variance)


def power(variance: ArrayLike, gamma: float) -> Array:
    """Return sigma^(2 gamma): 1 is the variance, 1/2 the standard deviation, 0 no weights at all."""
    return numbers("variance", variance, above=0) ** number("gamma", gamma)


def noisy(variance: ArrayLike, deviation: float, random: np.random.Generator) -> Array:
    """Return the variance times independent lognormal factors, whose logarithms have that deviation."""
    variance = numbers("variance", variance, above=0)
    return variance * np.exp(
        number("deviation", deviation, at_least=0) * random.standard_normal(variance.shape)
    )


def prompt_only(variance: ArrayLike) -> Array:
    """Return the mean variance of each prompt (P, S): what is known before a response is written."""
    variance = numbers("variance", variance, above=0, axes=2)
    return np.broadcast_to(variance.mean(1, keepdims=True), variance.shape)


# --- how smooth a variance is, and fields as smooth --------------------------------------------------


@dataclass(frozen=True)
class Smoothness:
    """Correlations of normal scores: between responses to one prompt, and between nearest neighbours among
    them in the space of features.
    """

    prompt: float
    neighbours: float


def smoothness(values: ArrayLike, features: Array) -> Smoothness:
    """Measure it of values (P, S) on features (P, S, d)."""
    scores, count = normal_scores(values), features.shape[1]
    both = ((scores.sum(1) ** 2 - (scores**2).sum(1)) / (count * (count - 1))).mean()
    near = np.take_along_axis(scores, _neighbours(features)[0], axis=1)  # (P, S)
    unit = (scores**2).mean()
    return Smoothness(float(both / unit), float((scores * near).mean() / unit))


@dataclass(frozen=True)
class Kernel:
    """Of a Gaussian field on texts: part + (1 - part) exp(-distance^2 / (2 length_scale^2)) for two responses
    to one prompt, without the first term for others.
    """

    part: float
    length_scale: float

    @staticmethod
    def like(wanted: Smoothness, features: Array) -> "Kernel":
        """Return the kernel of fields that are as smooth on these features (P, S, d)."""
        squares = _squared_distances(features)  # (P, S, S)
        count = features.shape[1]
        near = _neighbours(features)[1]  # (P, S)

        def part(scale: float) -> float:
            """Of the prompt, which makes responses to one prompt as alike as wanted."""
            alike = (np.exp(-squares / (2 * scale**2)).sum((1, 2)) - count).mean() / (count * (count - 1))
            return float(np.clip((wanted.prompt - alike) / (1 - alike), 0, 1))

        def gap(scale: float) -> float:
            share = part(scale)
            return share + (1 - share) * float(np.exp(-near / (2 * scale**2)).mean()) - wanted.neighbours

        ends = 0.05, 50.0
        if gap(ends[0]) > 0 or gap(ends[1]) < 0:
            raise ValueError(f"smoothness: no field on these features has {wanted}")
        scale = brentq(gap, *ends, xtol=1e-3)
        return Kernel(part(scale), scale)

    def field(self, features: Array, random: np.random.Generator) -> Array:
        """Draw one on features (P, S, d), of mean 0 and variance 1 at every text."""
        prompts, _, width = features.shape
        angles = features @ random.standard_normal((width, FREQUENCIES)) / self.length_scale  # (P, S, F)
        angles += random.uniform(0, 2 * np.pi, FREQUENCIES)
        waves = np.cos(angles) @ random.standard_normal(FREQUENCIES) * np.sqrt(2 / FREQUENCIES)  # (P, S)
        return np.sqrt(1 - self.part) * waves + np.sqrt(self.part) * random.standard_normal((prompts, 1))


def placebo(
    variance: ArrayLike,
    features: Array,
    random: np.random.Generator,
    unrelated: Sequence[Array] = (),
    kept: Sequence[Array] = (),
) -> Array:
    """Draw a field z_0 (P, S) of unit variance that is as smooth as the variance and says nothing of it.

    It is orthogonal, within prompts and between them, to the variance's normal scores and to the
    `unrelated` (P, S); with what is `kept` (P, S) it is correlated as they are, and with them no more than
    that implies.
    """
    scores = normal_scores(variance)
    kernel = Kernel.like(smoothness(variance, features), features)
    shared = _fitted(scores, kept)
    rest = scores - shared
    drawn = kernel.field(features, random)
    drawn = drawn - _fitted(drawn, [rest, *kept, *unrelated])
    return shared + np.sqrt(1 - shared.var() / scores.var()) * drawn / drawn.std()


def _fitted(values: Array, on: Sequence[Array]) -> Array:
    """Return the regression of values (P, S) on a constant and on parts within and between prompts."""
    columns = [np.ones_like(values)]
    for one in on:
        means = np.broadcast_to(one.mean(1, keepdims=True), one.shape)  # (P, S)
        columns += [means, one - means]
    design = np.stack([column.ravel() for column in columns], axis=1)  # (P * S, columns)
    return (design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]).reshape(values.shape)


def _squared_distances(features: Array) -> Array:
    """Return squared distances (P, S, S) between responses to one prompt."""
    squares = (features**2).sum(-1)  # (P, S)
    products = features @ features.swapaxes(1, 2)  # (P, S, S)
    return np.maximum(squares[:, :, None] + squares[:, None] - 2 * products, 0)


def _neighbours(features: Array) -> tuple[NDArray[np.intp], Array]:
    """Return the nearest other response to the same prompt, and the squared distance to it (P, S)."""
    squares = _squared_distances(features)  # (P, S, S)
    diagonal = np.arange(features.shape[1])
    squares[:, diagonal, diagonal] = np.inf
    return squares.argmin(-1), squares.min(-1)
