"""Gradients of a reward's log standard deviation, against autograd, simulation and closed forms."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from vaalign_lib.theory.attribute_losses import (
    bradley_terry_gradient,
    descend,
    fit_pairs,
    likelihood_gradient,
    preference_probability,
    regression_gradient,
    rising_share,
)


def test_bradley_terry_shrinks_every_deviation():
    """Autograd on many sampled pairs, for chosen and rejected responses."""
    random = np.random.default_rng(0)
    for gap, sigma, other in ((1.0, 0.7, 0.4), (-2.0, 1.5, 1.0), (0.0, 0.3, 2.0)):
        noise = torch.from_numpy(random.standard_normal((2, 400_000)))
        logs = torch.log(torch.tensor([sigma, other], dtype=torch.float64)).requires_grad_()
        sampled = gap + logs[0].exp() * noise[0] - logs[1].exp() * noise[1]
        (-torch.nn.functional.logsigmoid(sampled).mean()).backward()
        exact = bradley_terry_gradient(gap, [sigma, other], [other, sigma])
        assert np.allclose(logs.grad.numpy(), exact, atol=0.006)
    everywhere = bradley_terry_gradient(*np.meshgrid(np.linspace(-8, 8, 17), [0.01, 1, 5], [0.01, 1, 5]))
    assert (everywhere > 0).all()


def test_preference_probability_is_an_integral():
    for gap, variance in ((0.5, 0.3), (-2.0, 4.0)):
        spread = np.sqrt(variance)
        exact = quad(lambda z, m=gap, s=spread: expit(z) * norm.pdf(z, m, s), -30, 30)[0]
        assert preference_probability(gap, variance) == pytest.approx(exact, abs=1e-8)


def test_a_gaussian_likelihood_recovers_what_bradley_terry_forgets():
    """Infinitely many comparisons of eight items with known means and deviations."""
    random = np.random.default_rng(4)
    means, sigmas = random.normal(0, 1.5, 8), random.uniform(0.3, 3, 8)
    means -= means.mean()
    wins = preference_probability(means[:, None] - means, sigmas[:, None] ** 2 + sigmas**2)
    found, deviations = fit_pairs(wins, likelihood=True)
    assert np.allclose(found, means, atol=0.02) and np.allclose(deviations, sigmas, atol=0.05)
    _, forgotten = fit_pairs(wins, likelihood=False)
    assert forgotten.max() < 0.1


def test_equation_9_holds_on_average_and_not_in_every_draw():
    noise = np.random.default_rng(1).standard_normal(1_000_000)
    for error, sigma in ((0.8, 0.5), (0.0, 1.3), (-3.0, 0.4)):
        slopes = regression_gradient(error, sigma, noise)
        assert slopes.mean() == pytest.approx(2 * sigma**2, abs=4 * slopes.std() / 1000)
        assert (slopes < 0).mean() == pytest.approx(float(rising_share(error, sigma)), abs=0.002)
    log = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    ((1.0 + log.exp() * 0.7 - 0.4) ** 2).backward()
    assert float(log.grad) == pytest.approx(float(regression_gradient(0.6, np.exp(0.2), 0.7)))


def test_likelihood_stops_at_the_labels_variance():
    log = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (0.5 * 2.0 * (-2 * log).exp() + log).backward()
    assert float(log.grad) == pytest.approx(float(likelihood_gradient(2.0, np.exp(0.3))))
    regression, likelihood = descend(1.0, 0.25, 0.01, 3000)
    assert (np.diff(regression) < 0).all()
    time = 0.01 * np.arange(3001)  # d ln sigma / dt = -2 sigma^2
    assert np.allclose(regression, 1 / np.sqrt(1 + 4 * time), rtol=0.02)
    assert likelihood[-1] == pytest.approx(0.5, abs=1e-6)
