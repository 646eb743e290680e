"""Algorithms 7 and 8: the reward drawn from a judgement, and its variance."""

import numpy as np
import pytest

from vaalign_lib.rewards.base import Interval, Members

RANDOM = np.random.default_rng(0)


def test_members_give_their_mean_and_sample_variance():
    scores = RANDOM.normal(size=(5, 10))
    members = Members(scores)
    assert members.sample(RANDOM.random(5)) == pytest.approx([np.mean(row) for row in scores])
    assert members.variance() == pytest.approx([np.var(row, ddof=1) for row in scores])
    assert Members(scores, "mean").variance() == pytest.approx(members.variance() / 10)


def test_intervals_give_uniform_draws_with_their_variance():
    interval = Interval(np.array([[1.0, 100.0], [40.0, 41.0], [7.0, 7.0]]))
    draws = np.stack([interval.sample(RANDOM.random(3)) for _ in range(20_000)])
    assert draws.var(0) == pytest.approx(interval.variance(), rel=0.03)
    assert interval.variance()[0] == pytest.approx(99**2 / 12)
    assert interval.midpoint().tolist() == [50.5, 40.5, 7.0]
    assert (draws >= [1, 40, 7]).all() and (draws <= [100, 41, 7]).all()


def test_a_persistent_judge_answers_alike():
    interval = Interval(np.array([[0.0, 10.0]]), quantiles=np.array([0.25]))
    assert interval.sample(np.array([0.9])) == interval.sample(np.array([0.1])) == 2.5


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="at least two members"):
        Members(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="a <= b"):
        Interval(np.array([[2.0, 1.0]]))
