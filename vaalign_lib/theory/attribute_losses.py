"""What losses do to a reward's log standard deviation: why Bradley-Terry with sampled rewards and regression
shrink it, and why likelihoods do not (arXiv 2410.00847, Section 4.1 and Appendix B).

All gradients are with respect to ln sigma; a positive one lets gradient descent shrink sigma. Expectations
over the sampled noise are Gauss-Hermite sums.
"""

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, log_expit, ndtr

from vaalign_lib.statistics.arrays import Array

NODES = 64  # of a Gauss-Hermite sum


def _normal_nodes() -> tuple[Array, Array]:
    """Return places and weights of a sum that stands for the mean over a standard normal."""
    places, weights = hermegauss(NODES)
    return places, weights / weights.sum()


def bradley_terry_gradient(gap: ArrayLike, sigma: ArrayLike, other: ArrayLike) -> Array:
    """Return the expected gradient of -ln sigmoid(r - r'), both rewards sampled, for either's ln sigma.

    With r = mu + sigma epsilon it is sigma E[-epsilon sigmoid(-(r - r'))], by Stein's lemma sigma^2
    E[sigmoid'(r - r')], which is positive whatever the label, the means and the other deviation are.
    """
    places, weights = _normal_nodes()
    gap, sigma, other = np.broadcast_arrays(*(np.asarray(one, dtype=float) for one in (gap, sigma, other)))
    sampled = gap[..., None] + np.hypot(sigma, other)[..., None] * places  # (..., nodes)
    return np.asarray(sigma**2 * ((expit(sampled) * expit(-sampled)) @ weights))


def preference_probability(gap: ArrayLike, variance: ArrayLike) -> Array:
    """Return E[sigmoid(z)] for z from N(gap, variance), the sum of both rewards' variances (PURM)."""
    places, weights = _normal_nodes()
    spread = np.sqrt(np.asarray(variance, dtype=float))[..., None]  # (..., 1)
    return np.asarray(expit(np.asarray(gap, dtype=float)[..., None] + spread * places) @ weights)


def fit_pairs(wins: Array, likelihood: bool, start: float = 3.0) -> tuple[Array, Array]:
    """Fit means (of mean 0) and deviations of n items to how often each wins against each other (n, n).

    With the `likelihood` of Gaussian rewards, -ln E[sigmoid], as PURM (arXiv 2503.22480), else with the
    Bradley-Terry loss of sampled rewards, -E[ln sigmoid]; deviations begin at `start`, which should be
    large: where they are nearly 0, so is the gradient for their logarithms.
    """
    count = len(wins)
    first, second = np.triu_indices(count, 1)  # (pairs,)
    won = wins[first, second]
    places, weights = _normal_nodes()

    def loss(parameters: Array) -> tuple[float, Array]:
        means, sigmas = parameters[:count], np.exp(parameters[count:])
        spread = np.hypot(sigmas[first], sigmas[second])
        sampled = (means[first] - means[second])[:, None] + spread[:, None] * places  # (pairs, nodes)
        up, down = expit(sampled), expit(-sampled)
        if likelihood:
            share, lost = up @ weights, down @ weights  # (pairs,)
            value = won * np.log(share) + (1 - won) * np.log(lost)
            slope = (won / share - (1 - won) / lost)[:, None] * up * down  # (pairs, nodes)
        else:
            value = won * (log_expit(sampled) @ weights) + (1 - won) * (log_expit(-sampled) @ weights)
            slope = won[:, None] - up  # (pairs, nodes)
        by_gap, by_spread = slope @ weights, (slope * places) @ weights / spread  # (pairs,)
        gradient = np.zeros(2 * count)
        np.add.at(gradient, first, by_gap)
        np.add.at(gradient, second, -by_gap)
        for side in (first, second):
            np.add.at(gradient, count + side, by_spread * sigmas[side] ** 2)
        return -float(value.mean()), -gradient / len(won)

    begin = np.concatenate([np.zeros(count), np.full(count, np.log(start))])
    bounds = [(-20.0, 20.0)] * count + [(np.log(1e-3), np.log(20))] * count
    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    means, sigmas = found.x[:count], np.exp(found.x[count:])
    return means - means.mean(), sigmas


def regression_gradient(error: ArrayLike, sigma: ArrayLike, noise: ArrayLike) -> Array:
    """Return one draw's gradient of (mu + sigma epsilon - score)^2 for ln sigma, at an error mu - score:
    2 sigma epsilon (error + sigma epsilon), whose mean over epsilon is 2 sigma^2 (Equation 9).
    """
    moved = np.asarray(sigma, dtype=float) * np.asarray(noise, dtype=float)
    return np.asarray(2 * moved * (np.asarray(error, dtype=float) + moved))


def rising_share(error: ArrayLike, sigma: ArrayLike) -> Array:
    """Return how often a single draw's gradient of Equation 9 is negative, so that the step enlarges sigma:
    the probability that epsilon lies between 0 and -error / sigma.
    """
    ratio = np.abs(np.asarray(error, dtype=float)) / np.asarray(sigma, dtype=float)
    return np.asarray(ndtr(ratio) - 0.5)


def likelihood_gradient(square: ArrayLike, sigma: ArrayLike) -> Array:
    """Return the gradient of Equation 4 for ln sigma at a mean squared error: 1 - square / sigma^2."""
    return np.asarray(1 - np.asarray(square, dtype=float) / np.asarray(sigma, dtype=float) ** 2)


def descend(start: float, square: float, rate: float, steps: int) -> tuple[Array, Array]:
    """Return sigma after 0, 1, .. gradient steps on ln sigma (steps + 1,) each: by Equation 9's expectation
    and by Equation 4 at labels of variance `square` about a right mean.
    """
    logs = np.full((2, steps + 1), np.log(start))
    for k in range(steps):
        sigma = np.exp(logs[:, k])
        slope = np.array([2 * sigma[0] ** 2, likelihood_gradient(square, sigma[1])])
        logs[:, k + 1] = logs[:, k] - rate * slope
    regression, likelihood = np.exp(logs)
    return regression, likelihood
