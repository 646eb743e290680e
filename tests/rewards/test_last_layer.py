"""Cheap variances of Bradley-Terry heads, against a general optimizer, a posterior's curvature and draws."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from vaalign_lib.rewards import last_layer

T, D, H = 60, 4, 3


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    gaps = random.standard_normal((T, D))
    truth = random.standard_normal((H, D))
    wins = (random.random((H, T)) < expit(truth @ gaps.T)).astype(float)
    counts = random.poisson(1.0, (H, T)).astype(float)
    return gaps, wins, counts


def loss(weights, gaps, wins, counts):
    """Minus the log posterior of one head, written anew."""
    scores = gaps @ weights
    likelihood = counts * (wins * log_expit(scores) + (1 - wins) * log_expit(-scores))
    return -likelihood.sum() + 0.5 * last_layer.RIDGE * (weights**2).sum()


def test_heads_are_those_of_a_general_optimizer(problem):
    gaps, wins, counts = problem
    found = last_layer.fit_heads(gaps, wins, counts)
    for k in range(H):
        expected = minimize(loss, np.zeros(D), (gaps, wins[k], counts[k]), tol=1e-10).x
        np.testing.assert_allclose(found[k], expected, atol=1e-4)


def test_three_steps_from_a_models_own_weights_are_enough(problem):
    gaps, wins, _ = problem
    counts = np.ones((H, T))
    start = last_layer.fit_heads(gaps, wins, counts)
    heads = last_layer.bootstrap_heads(gaps, wins, counts, 20, np.random.default_rng(1), start)
    random = np.random.default_rng(1)
    for k in range(H):
        drawn = random.poisson(np.ones((20, T))).astype(float)
        whole = last_layer.fit_heads(gaps, np.repeat(wins[k][None], 20, 0), drawn)
        np.testing.assert_allclose(heads[k], whole, atol=1e-3)
    assert heads.std(1).min() > 0.05


def test_laplace_is_the_inverse_curvature_of_the_posterior(problem):
    gaps, wins, counts = problem
    weights = last_layer.fit_heads(gaps, wins, counts)
    features = np.random.default_rng(2).standard_normal((5, D))
    found = last_layer.laplace_variance(features, gaps, weights, counts)
    step = 1e-4 * np.eye(D)
    for k in range(H):
        at = (gaps, wins[k], counts[k])
        around = [
            [
                sum(
                    a * b * loss(weights[k] + a * step[i] + b * step[j], *at)
                    for a in (1, -1)
                    for b in (1, -1)
                )
                / 4e-8
                for j in range(D)
            ]
            for i in range(D)
        ]
        expected = np.einsum("ti,ij,tj->t", features, np.linalg.inv(around), features)
        np.testing.assert_allclose(found[k], expected, rtol=1e-3)


def test_dropout_is_what_random_masks_give():
    random = np.random.default_rng(3)
    weights, features, share = random.standard_normal((2, D)), random.standard_normal((6, D)), 0.2
    kept = (random.random((200_000, D)) > share) / (1 - share)
    scores = np.einsum("md,td,nd->mnt", kept, features, weights)
    found = last_layer.dropout_variance(features, weights, share)
    np.testing.assert_allclose(found, scores.var(0), rtol=0.02)


def test_a_distilled_head_finds_a_loglinear_variance():
    random = np.random.default_rng(4)
    seen, features = random.standard_normal((2000, D)), random.standard_normal((7, D))
    slope = random.standard_normal((2, D))
    found = last_layer.distilled_variance(features, seen, np.exp(0.3 + slope @ seen.T))
    np.testing.assert_allclose(found, np.exp(0.3 + slope @ features.T), rtol=0.02)
