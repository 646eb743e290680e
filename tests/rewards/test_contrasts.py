"""The variance of contrasts: what members share about a prompt does not count."""

import numpy as np
import pytest

from vaalign_lib.rewards.base import ScoreSource
from vaalign_lib.rewards.contrasts import Contrasts

ANCHOR = "so so"
PROMPTS, RESPONSES = ["p", "p", "q", "p"], ["good", "bad", "good", ANCHOR]
POLICY = np.array([0, 0, 0, 1])


def numbers(*parts, scale=1.0):
    """Return scores by three members that only these parts decide."""
    return scale * np.random.default_rng([ord(one) for one in "".join(map(str, parts))]).normal(size=3)


def source(score, asked=None, **settings):
    """Return an ensemble with score(prompt, response, policy); `asked` collects what it was asked."""

    class Ensemble(ScoreSource):
        def scores(self, prompts, responses, policy):
            texts = list(zip(prompts, responses, policy.tolist(), strict=True))
            if asked is not None:
                asked.append(texts)
            return np.array([score(*one) for one in texts])

    return Ensemble(**settings)


def own(prompt, response, policy):
    """Return scores without anything that members share about a prompt."""
    return numbers(response, prompt, policy)


def shifted(prompt, response, policy):
    """Return the same, with a large shift of every member that all responses to a prompt share."""
    return own(prompt, response, policy) + numbers(prompt, policy, scale=30.0)


@pytest.mark.parametrize("variance_of", ["member", "mean"])
def test_weights_are_the_variance_of_differences_from_the_anchor(variance_of):
    said = Contrasts(source(shifted, variance_of=variance_of), ANCHOR).judge(PROMPTS, RESPONSES, POLICY)
    texts = zip(PROMPTS, RESPONSES, POLICY.tolist(), strict=True)
    gaps = [shifted(prompt, response, one) - shifted(prompt, ANCHOR, one) for prompt, response, one in texts]
    by_hand = np.array([sum((gap - gap.mean()) ** 2) / 2 for gap in gaps]) / (
        3 if variance_of == "mean" else 1
    )
    np.testing.assert_allclose(said.weight(), by_hand, atol=1e-9)
    assert said.weight()[3] == 0 and (said.weight()[:3] > 0).all()  # the anchor is itself


def test_a_shift_that_a_prompt_shares_changes_no_weight():
    one, other = (
        Contrasts(source(score), ANCHOR).judge(PROMPTS, RESPONSES, POLICY) for score in (own, shifted)
    )
    np.testing.assert_allclose(one.weight(), other.weight(), atol=1e-9)
    assert (other.variance()[:3] > 5 * one.variance()[:3]).any()


def test_rewards_variances_and_true_rewards_are_the_ensembles():
    plain = source(shifted, truth=lambda prompts, responses: np.arange(4.0))
    contrasts = Contrasts(plain, ANCHOR)
    said, expected = (one.judge(PROMPTS, RESPONSES, POLICY) for one in (contrasts, plain))
    np.testing.assert_array_equal(said.scores, expected.scores)
    np.testing.assert_array_equal(said.variance(), expected.variance())
    np.testing.assert_array_equal(said.sample(np.zeros(4)), expected.sample(np.zeros(4)))
    assert contrasts.true_reward(said, PROMPTS, RESPONSES).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(expected.weight(), expected.variance())


def test_each_prompt_is_scored_once_for_each_policy():
    asked = []
    contrasts = Contrasts(source(own, asked), ANCHOR)
    first = contrasts.judge(PROMPTS, RESPONSES, POLICY)
    assert asked[1] == [("p", ANCHOR, 0), ("q", ANCHOR, 0), ("p", ANCHOR, 1)]
    again = contrasts.judge(PROMPTS, RESPONSES, POLICY)
    np.testing.assert_array_equal(first.weight(), again.weight())
    assert len(asked) == 3  # the second time only the responses
    contrasts.judge(["q", "p"], ["good", "good"], np.array([1, 1]))
    assert asked[4] == [("q", ANCHOR, 1)]
