"""Weights that know a chosen part of a variance: same values, wanted correlations, same smoothness."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.feature_bench import Texts, stored_texts
from vaalign_lib.theory import variance_weights as weights
from vaalign_lib.theory.variance_weights import Kernel, correlated, normal_scores, placebo, smoothness


@pytest.fixture(scope="module")
def texts() -> Texts:
    return stored_texts(World(0), prompts=48, responses=60)


@pytest.fixture(scope="module")
def field(texts):
    return placebo(texts.variance, texts.varying, np.random.default_rng(1), unrelated=[texts.gold])


def within(values):
    return (values - values.mean(1, keepdims=True)).ravel()


@pytest.mark.parametrize("rho", [-1.0, -0.5, 0.0, 0.3, 1.0])
def test_weights_have_the_values_of_the_variance_and_the_correlation_asked_for(texts, field, rho):
    found = correlated(texts.variance, field, rho)
    np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(texts.variance, axis=None))
    scores = [normal_scores(one).ravel() for one in (found, texts.variance)]
    assert np.corrcoef(*scores)[0, 1] == pytest.approx(rho, abs=0.02)
    if rho == 1:
        np.testing.assert_array_equal(found, texts.variance)


def test_the_placebo_says_nothing_of_the_variance_or_of_gold(texts, field):
    scores = normal_scores(texts.variance)
    for other in (scores, texts.gold):
        assert abs(np.corrcoef(within(field), within(other))[0, 1]) < 1e-9
        assert abs(np.corrcoef(field.mean(1), other.mean(1))[0, 1]) < 1e-9
    assert abs(spearmanr(correlated(texts.variance, field, 0), texts.variance, axis=None)[0]) < 0.02


def test_a_placebo_that_keeps_gold_is_related_to_it_as_the_variance_and_to_that_no_more_than_this_implies(
    texts,
):
    gold = texts.gold - 0.8 * normal_scores(texts.variance)  # related to it, unlike in the world
    found = placebo(texts.variance, texts.varying, np.random.default_rng(2), kept=[gold])
    scores = normal_scores(texts.variance)
    wanted = np.corrcoef(within(scores), within(gold))[0, 1]
    assert wanted < -0.3
    cov = [np.cov(within(one), within(gold))[0, 1] for one in (found, scores)]
    assert cov[0] == pytest.approx(cov[1], rel=1e-6)
    fitted = weights._fitted(scores, [gold])
    assert abs(np.mean((found - fitted) * (scores - fitted))) < 1e-9


def test_a_placebo_is_as_smooth_as_the_variance(texts):
    features, wanted = texts.varying, smoothness(texts.variance, texts.varying)
    drawn = [
        smoothness(
            correlated(texts.variance, placebo(texts.variance, features, random, [texts.gold]), 0), features
        )
        for random in np.random.default_rng(0).spawn(12)
    ]
    assert 0.2 < wanted.prompt < wanted.neighbours - 0.2  # there is something to match
    assert np.mean([one.prompt for one in drawn]) == pytest.approx(wanted.prompt, abs=0.08)
    assert np.mean([one.neighbours for one in drawn]) == pytest.approx(wanted.neighbours, abs=0.05)


def test_fields_have_their_kernel():
    kernel, random = Kernel(part=0.3, length_scale=1.5), np.random.default_rng(0)
    features = np.array([[[0.0, 0.0], [1.0, 0.5]], [[0.0, 0.0], [4.0, 4.0]]])
    drawn = np.array([kernel.field(features, random).ravel() for _ in range(8000)])
    near = np.exp(-1.25 / (2 * 1.5**2))
    expected = np.array([[1, 0.3 + 0.7 * near], [0.3 + 0.7 * near, 1]])
    np.testing.assert_allclose(np.cov(drawn.T)[:2, :2], expected, atol=0.06)
    assert np.cov(drawn.T)[0, 2] == pytest.approx(0.7, abs=0.06)  # like texts, another prompt


def test_misplaced_weights(texts):
    variance = texts.variance
    np.testing.assert_allclose(weights.power(variance, 0.5) ** 2, variance)
    assert (weights.power(variance, 0) == 1).all()
    noise = np.log(weights.noisy(variance, 0.4, np.random.default_rng(0)) / variance)
    assert noise.std() == pytest.approx(0.4, rel=0.1) and abs(noise.mean()) < 0.03
    by_prompt = weights.prompt_only(variance)
    assert (by_prompt == by_prompt[:, :1]).all() and by_prompt.mean() == pytest.approx(variance.mean())
    with pytest.raises(ValueError, match="rho: expected a finite number of at least -1 up to 1"):
        correlated(variance, variance, 1.5)
