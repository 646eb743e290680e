"""Rewards by people: every policy hears one of them for each word."""

import numpy as np
import pytest

from vaalign_lib.data.raters import rated
from vaalign_lib.rewards.raters import ALIKE, AS_USED, ExchangedWords, HeardWords

PEOPLE = {"good": [2, 1, 1, 3, 2, 2, 1, 2, 3, 2], "bad": [-3, -2, -1, -4, -2, -2, -3, -2, 1, -2],
          ":)": [2, 2, 3, 1, 2, 2, 3, 2, 1, 2], "odd": [-1, 4, 0]}  # fmt: skip
TEXTS = ["Good, good BAD day", ":) odd?", "nothing known here", "good"]


@pytest.fixture
def source():
    return HeardWords(rated((word, "words", ratings) for word, ratings in PEOPLE.items()), seed=7)


def judged(source, policies):
    """Return rewards, variances and true rewards (policies, texts)."""
    writers = np.repeat(np.arange(policies), len(TEXTS))
    asked, answers = [""] * len(writers), TEXTS * policies
    judgement = source.judge(asked, answers, writers)
    found = judgement.sample(np.random.default_rng(0).random(len(writers))), judgement.variance()
    return [one.reshape(policies, -1) for one in (*found, source.true_reward(judgement, asked, answers))]


def test_over_policies_rewards_are_unbiased_and_vary_as_said(source):
    rewards, variances, truths = judged(source, 20_000)
    expected = [
        (2 * np.mean(PEOPLE["good"]) + np.mean(PEOPLE["bad"])) / 3,
        (np.mean(PEOPLE[":)"]) + np.mean(PEOPLE["odd"])) / 2,
        0,
        np.mean(PEOPLE["good"]),
    ]
    spread = [
        (4 * np.var(PEOPLE["good"]) + np.var(PEOPLE["bad"])) / 9,
        (np.var(PEOPLE[":)"]) + np.var(PEOPLE["odd"])) / 4,
        0,
        np.var(PEOPLE["good"]),
    ]
    np.testing.assert_allclose(truths, np.tile(expected, (len(truths), 1)))
    np.testing.assert_allclose(variances, np.tile(spread, (len(variances), 1)), atol=1e-12)
    assert (np.abs(rewards.mean(0) - expected) <= 4 * np.sqrt(np.array(spread) / len(rewards))).all()
    np.testing.assert_allclose(rewards.var(0), spread, rtol=0.05, atol=1e-12)


def test_a_policy_hears_one_person_for_a_word_and_always_the_same(source):
    rewards, _, _ = judged(source, 50)
    again = HeardWords(source.words, source.seed)
    order = np.random.default_rng(1).permutation(50)
    kept = again.judge([""] * 50, ["and good again, good"] * 50, order).midpoint()
    np.testing.assert_allclose(kept, rewards[order, 3])
    for policy in range(50):
        who = source.people(policy)
        np.testing.assert_allclose(rewards[policy, 3], PEOPLE["good"][who[0]])
        expected = (2 * PEOPLE["good"][who[0]] + PEOPLE["bad"][who[1]]) / 3
        np.testing.assert_allclose(rewards[policy, 0], expected)
    other, _, _ = judged(HeardWords(source.words, 8), 50)
    assert (other[:, 3] != rewards[:, 3]).any()


def test_a_text_without_known_words_is_neutral_and_certain(source):
    for texts in (["", "goodness me"], ["?!", "godd"]):
        judgement = source.judge(["", ""], texts, np.array([0, 1]))
        assert not judgement.bounds.any() and not judgement.variance().any()
        assert not source.true_reward(judgement, ["", ""], texts).any()


def test_words_are_known_whatever_their_case_and_punctuation(source):
    assert [*source.known_words('"GOOD!" :) ,:), :-( bad-ish odd.')] == [0, 2, 3]


def test_no_responses_are_no_rewards(source):
    assert source.judge([], [], np.array([], dtype=int)).bounds.shape == (0, 2)


def test_the_placebo_exchanges_variances_among_words_of_like_use_and_mean():
    random = np.random.default_rng(0)
    rows = [(f"w{k}", "words", random.integers(-4, 5, 10).tolist()) for k in range(1000)]
    source, used = HeardWords(rated(rows), seed=3), random.poisson(3, 1000)
    placebo = ExchangedWords(source, used)
    means, own = source.moments
    assert np.allclose(np.sort(placebo.variances), np.sort(own)) and (placebo.variances != own).mean() > 0.9
    rest = [one - np.polyval(np.polyfit(means, one, 4), means) for one in (placebo.variances, own)]
    assert abs(np.corrcoef(rest)[0, 1]) < 0.1  # beyond the mean
    origin = np.array([np.flatnonzero(np.isclose(own, one)) for one in placebo.variances], dtype=object)
    gaps = [np.abs(means[one] - means[k]).min() for k, one in enumerate(origin)]
    assert np.mean(gaps) < means.std() * ALIKE * 2 / AS_USED * 3
    texts = ["w1 w2 w2", "w3", "none"]
    judged, plain = placebo.judge([""] * 3, texts, np.arange(3)), source.judge([""] * 3, texts, np.arange(3))
    assert (judged.bounds == plain.bounds).all()
    one, two = placebo.variances[1:3]
    assert np.allclose(judged.weight(), [one / 9 + two * 4 / 9, placebo.variances[3], 0])
    assert source.uses(texts)[:4].tolist() == [0, 1, 2, 1]
