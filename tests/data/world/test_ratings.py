"""Raters of attributes: their moments are those of their ratings."""

import numpy as np

from vaalign_lib.data.world.attributes import ATTRIBUTES
from vaalign_lib.data.world.ratings import AttributeRaters
from vaalign_lib.data.world.world import World

WORLD = World(3)
RATERS = AttributeRaters(WORLD)


def test_mean_and_variance_are_those_of_many_ratings():
    prompts, responses = WORLD.corpus(40, np.random.default_rng(0))
    means, variances = RATERS.moments(prompts, responses)
    drawn = RATERS.ratings(prompts, responses, 4000, np.random.default_rng(1))
    assert drawn.shape == (40, 4000, 5)
    z = (drawn.mean(1) - means) / np.sqrt(variances / 4000)
    assert np.abs(z).max() < 4.5
    assert np.allclose(drawn.var(1), variances, rtol=0.13)


def test_nobody_is_biased_and_texts_differ_in_how_they_divide():
    prompts, responses = WORLD.corpus(2000, np.random.default_rng(0))
    means, variances = RATERS.moments(prompts, responses)
    assert np.array_equal(means, WORLD.assess(prompts, responses)[list(ATTRIBUTES)].to_numpy(dtype=float))
    assert np.allclose(RATERS.tastes.mean(0), 0)
    high, low = np.quantile(variances, [0.9, 0.1], axis=0)
    assert (high > 2.5 * low).all()
    again = AttributeRaters(World(3)).ratings(prompts[:5], responses[:5], 2, np.random.default_rng(2))
    assert np.array_equal(again, RATERS.ratings(prompts[:5], responses[:5], 2, np.random.default_rng(2)))
