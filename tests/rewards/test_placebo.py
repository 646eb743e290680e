"""The placebo: the variance's distribution and smoothness, and nothing of what it knows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import ks_2samp, norm, rankdata

from vaalign_lib.data.world.world import World
from vaalign_lib.rewards.base import Interval
from vaalign_lib.rewards.placebo import Placebo
from vaalign_lib.rewards.simulated_judge import PersistentJudges, stand_ins

PROMPTS, EACH = 400, 10


def judged(seed):
    """Return prompts and responses that the placebo was not fitted on, gold, and what both say of them."""
    world = World(seed)
    judge = stand_ins(world)["stand-in for Gemini 2.0 Flash"]
    placebo = Placebo(judge, world, seed)
    random = world.rng("test")
    prompts = np.repeat(world.prompts(PROMPTS, random), EACH).tolist()
    responses = world.responses(prompts, random.beta(2, 2, len(prompts)), random)
    said = placebo.judge(prompts, responses, np.zeros(len(prompts), dtype=int))
    return world, (prompts, responses), said


def scores(values):
    return norm.ppf((rankdata(values) - 0.5) / len(values))


def within(values):
    table = values.reshape(PROMPTS, EACH)
    return (table - table.mean(1, keepdims=True)).ravel()


@pytest.fixture(scope="module")
def worlds():
    return [judged(seed) for seed in range(4)]


def test_weights_have_the_variances_distribution(worlds):
    for _, _, said in worlds:
        assert ks_2samp(said.weight(), said.variance()).statistic < 0.06
        assert said.weight().mean() == pytest.approx(said.variance().mean(), rel=0.08)


def test_weights_know_nothing_of_the_variance(worlds):
    for among in (scores, lambda values: within(scores(values))):
        found = [np.corrcoef(among(said.weight()), among(said.variance()))[0, 1] for *_, said in worlds]
        assert np.abs(found).max() < 0.12
        assert abs(np.mean(found)) < 0.05


def test_weights_know_as_much_of_gold_as_the_variance(worlds):
    gaps = []
    for world, texts, said in worlds:
        gold = within(scores(world.gold(*texts)))
        of = [np.corrcoef(gold, within(scores(one)))[0, 1] for one in (said.weight(), said.variance())]
        assert of[1] < -0.05  # else there is nothing to match
        gaps.append(of[0] - of[1])
    assert np.abs(gaps).max() < 0.1
    assert abs(np.mean(gaps)) < 0.04


def test_weights_are_nearly_as_smooth_as_the_variance(worlds):
    """Correlations of normal scores by distance of features, within a prompt and between prompts, over draws.

    Over the nearest texts the placebo is rougher, by about a half.
    """
    world, texts, said = worlds[0]
    judge = stand_ins(world)["stand-in for Gemini 2.0 Flash"]
    drawn = [replace(said, weights=Placebo(judge, world, seed).weights(*texts)) for seed in range(6)]
    for bounds in ((0, 2), (2, 3), (3, 4.5)):
        for same in (True, False):
            ours, theirs = np.mean([_correlation(world, texts, one, bounds, same) for one in drawn], axis=0)
            if bounds[0] == 0:
                assert 0.4 * theirs < ours < 1.2 * theirs, same
            else:
                assert ours == pytest.approx(theirs, abs=0.12), (bounds, same)


def _correlation(world, texts, said, bounds, same):
    part = slice(0, 1500)
    features = world.features(*texts)[part, :10]
    prompt = np.repeat(np.arange(PROMPTS), EACH)[part, None]
    near = pdist(features)
    chosen = (near >= bounds[0]) & (near < bounds[1]) & ((pdist(prompt) == 0) == same)
    pairs = np.triu_indices(len(prompt), 1)  # in the order of pdist
    drawn = [scores(one)[part] for one in (said.weight(), said.variance())]
    return [np.mean((one[pairs[0]] * one[pairs[1]])[chosen]) for one in drawn]


def test_rewards_and_variances_are_the_sources():
    world = World(0)
    judges = PersistentJudges(stand_ins(world)["stand-in for Gemini 2.0 Flash"], world.features, 3)
    prompts, responses = world.corpus(50, np.random.default_rng(0))
    policy = np.arange(50) % 4
    said, plain = (
        Placebo(judges, world, 0).judge(prompts, responses, policy),
        judges.judge(prompts, responses, policy),
    )
    uniforms = np.full(50, 0.3)
    np.testing.assert_array_equal(said.sample(uniforms), plain.sample(uniforms))
    np.testing.assert_array_equal(said.variance(), plain.variance())
    assert np.abs(said.weight() - plain.weight()).max() > 1
    np.testing.assert_array_equal(plain.weight(), plain.variance())


def test_weights_that_cannot_be_are_refused():
    bounds = np.array([[0.0, 1.0], [0.0, 2.0]])
    for weights in (np.array([1.0]), np.array([1.0, -0.1]), np.array([1.0, np.inf])):
        with pytest.raises(ValueError, match="weights"):
            Interval(bounds, weights=weights)
