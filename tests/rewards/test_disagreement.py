"""What variance between models consists of: limits that are known, and simulation."""

import numpy as np
import pytest

from vaalign_lib.rewards.calibration import (
    between_ensembles,
    difference_ratio,
    initial_share,
    sample_variance,
)

RANDOM = np.random.default_rng(0)


def test_sample_variance_divides_by_one_less():
    scores = RANDOM.normal(size=(7, 10))
    slow = [sum((x - np.mean(row)) ** 2 for x in row) / 9 for row in scores]
    assert sample_variance(scores) == pytest.approx(slow)


def test_shifted_copies_share_no_difference_and_independent_scores_all():
    base, shift = RANDOM.normal(size=(2, 50, 1)), RANDOM.normal(size=10)
    assert difference_ratio(base[0] + shift, base[1] + shift) == pytest.approx(0, abs=1e-12)
    chosen, rejected = RANDOM.normal(size=(2, 4000, 10))
    assert difference_ratio(chosen, rejected).mean() == pytest.approx(1, abs=0.03)


def test_initial_share_is_one_if_all_moved_alike_and_small_if_no_trace_is_left():
    initial = RANDOM.normal(size=(2000, 9))
    moved = initial + RANDOM.normal(size=(2000, 1))
    assert initial_share(initial, moved) == pytest.approx(1)
    assert initial_share(initial, RANDOM.normal(size=(2000, 9))).mean() == pytest.approx(1 / 8, abs=0.02)


def test_between_ensembles_of_independent_members_is_a_tenth_of_within():
    scores = RANDOM.normal(size=(300, 10, 40)) * 2.0
    within, between = between_ensembles(scores)
    assert within.mean() == pytest.approx(4, rel=0.03) and between.mean() == pytest.approx(0.4, rel=0.05)
    np.testing.assert_allclose(between, np.var(scores.mean(1), axis=0, ddof=1))
