"""Cheap variances: Bradley-Terry heads on fixed features by Newton's method, and what says how sure they are.

H heads, or N reward models of which each has heads of its own, learn from T pairs that all share, each with
its own labels and counts of every pair, so that all of them are fitted in the same few products. Features
(texts, d) are of frozen layers; scores have no intercept, for pairs say nothing of it.
"""

import numpy as np
from scipy.special import expit

from vaalign_lib.statistics.arrays import Array, count, number

STEPS = 8  # of Newton's method from zero; from a solution nearby three do
RIDGE = 1.0  # precision of a weight's prior


def fit_heads(gaps: Array, wins: Array, counts: Array, start: Array | None = None) -> Array:
    """Return the weights (H, d) that make labels likeliest under the prior N(0, 1 / RIDGE).

    Gaps (T, d) are features of the first text minus the second, wins (H, T) 1 where the first is
    preferred, counts (H, T) how often a head has seen each pair. `start` (H, d) spares steps.
    """
    weights = np.zeros((len(counts), gaps.shape[1])) if start is None else start
    for _ in range(STEPS if start is None else 3):
        chance = expit(weights @ gaps.T)  # (H, T)
        gradient = (counts * (wins - chance)) @ gaps - RIDGE * weights  # (H, d)
        curvature = _curvature(gaps, counts * chance * (1 - chance))
        weights = weights + np.linalg.solve(curvature, gradient[..., None])[..., 0]
    return weights


def _curvature(gaps: Array, factors: Array) -> Array:
    """Return the sum over pairs of factor gap gap' and the ridge (H, d, d)."""
    width = gaps.shape[1]
    rows, columns = np.triu_indices(width)  # (d (d + 1) / 2,)
    products = factors @ (gaps[:, rows] * gaps[:, columns])  # (H, d (d + 1) / 2)
    curvature = np.empty((len(factors), width, width))
    curvature[:, rows, columns] = curvature[:, columns, rows] = products
    return curvature + RIDGE * np.eye(width)


def bootstrap_heads(
    gaps: Array, wins: Array, counts: Array, members: int, random: np.random.Generator, start: Array
) -> Array:
    """Return heads (N, members, d), each fitted to a Poisson bootstrap of its model's pairs.

    Wins and counts (N, T) are the models', `start` (N, d) their own weights.
    """
    count("members", members, least=2)
    found = []
    for model in range(len(counts)):  # one at a time: the products of all would not fit into memory
        drawn = random.poisson(np.repeat(counts[model][None], members, axis=0)).astype(float)  # (members, T)
        found.append(fit_heads(gaps, wins[model], drawn, np.repeat(start[model][None], members, axis=0)))
    return np.stack(found)


def laplace_variance(features: Array, gaps: Array, weights: Array, counts: Array) -> Array:
    """Return phi' H^-1 phi (N, texts): the score's variance in the last layer's Laplace approximation."""
    chance = expit(weights @ gaps.T)  # (N, T)
    lower = np.linalg.cholesky(_curvature(gaps, counts * chance * (1 - chance)))  # (N, d, d)
    return np.stack([(np.linalg.solve(one, features.T) ** 2).sum(0) for one in lower])


def dropout_variance(features: Array, weights: Array, share: float = 0.1) -> Array:
    """Return the score's variance (N, texts) when a share of the features is dropped at random.

    Kept ones are scaled by 1 / (1 - share), so its mean is the score, its variance the sum of w^2 phi^2 share
    / (1 - share).
    """
    number("share", share, above=0, below=1)
    return share / (1 - share) * weights**2 @ (features**2).T


def distilled_variance(features: Array, seen: Array, variances: Array) -> Array:
    """Return what one more head says of an ensemble's variance (N, texts), from its variances on texts that
    it has seen (N, seen): a ridge regression of their logarithm on the features (seen, d).
    """
    design, wanted = (np.column_stack([np.ones(len(one)), one]) for one in (seen, features))
    penalty = RIDGE * np.diag([0.0, *np.ones(seen.shape[1])])  # (d + 1, d + 1)
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ np.log(variances).T)  # (d + 1, N)
    return np.exp(wanted @ solution).T
