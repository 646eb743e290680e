"""Power against simulation and published sample sizes."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from vaalign_lib.statistics.power import (
    coverage_over_worlds,
    policies_for_p,
    policies_for_risks,
    risk_power,
    smallest_gap_seen,
    smallest_risk_seen,
    smallest_variance_ratio_seen,
)
from vaalign_lib.statistics.tests import f_test, two_proportions


@pytest.mark.parametrize(("first", "second", "policies"), [(0.29, 0.05, 80), (0.4, 0.3, 50)])
def test_power_is_the_share_of_simulated_rejections(first, second, policies):
    random, repeats = np.random.default_rng(0), 4000
    more, fewer = (random.binomial(policies, p, repeats).tolist() for p in (first, second))
    pairs = zip(more, fewer, strict=True)
    seen = np.mean([two_proportions(a, policies, b, policies).p < 0.05 for a, b in pairs])
    power = risk_power(first, second, policies)
    assert power == pytest.approx(seen, abs=4 * np.sqrt(power * (1 - power) / repeats) + 1e-3)


def test_sizes_have_the_power_asked_for():
    for first, second in ((0.48, 0.41), (0.29, 0.24), (0.5, 0.2)):
        needed = policies_for_risks(first, second)
        assert risk_power(first, second, needed) == pytest.approx(0.8, abs=0.02)
    seen = smallest_risk_seen(0.1, 80)
    assert risk_power(seen, 0.1, 80) == pytest.approx(0.8, abs=1e-3)
    assert risk_power(0.1, 0.1, 80) < 0.06
    assert np.isnan(smallest_risk_seen(0.9, 5))


def test_policies_for_a_p_value():
    needed = policies_for_p(0.29, 0.24, 0.038)
    before, after = (two_proportions(0.29 * n, n, 0.24 * n, n).p for n in (needed - 1, needed))
    assert after <= 0.038 < before


def test_ratios_seen_by_simulation():
    random, ratio = np.random.default_rng(1), smallest_variance_ratio_seen(80)
    a, b = random.normal(size=(2, 3000, 80)).var(axis=-1, ddof=1)
    seen = ratio * a / b > f_test(1, 80, 1, 80).critical  # so few fall below 1 / critical
    assert seen.mean() == pytest.approx(0.8, abs=0.03)
    for one, other in zip((ratio * a[:20]).tolist(), b[:20].tolist(), strict=True):
        assert (f_test(one, 80, other, 80).p < 0.05) == (one / other > f_test(1, 80, 1, 80).critical)


def test_intervals_over_worlds_cover_worlds():
    """Student's interval holds whatever worlds do; that of policies alone only where worlds do not differ."""
    alike, apart = (coverage_over_worlds(4, 80, between) for between in (0.0, 0.5))
    for found in (alike, apart):
        assert found["over worlds"] == pytest.approx(0.95, abs=0.01)
    assert alike["over policies"] == pytest.approx(0.95, abs=0.015)
    # the mean of four has deviation sqrt(.5^2 + s^2) / 2, the interval s / 2 times 1.96, s^2 as below
    s = np.sqrt(2 * (2 / 79 + 4 / (9 * 80)))
    expected = 2 * norm.cdf(1.96 * s / np.hypot(0.5, s)) - 1
    assert apart["over policies"] == pytest.approx(expected, abs=0.02)
    assert apart["width"] > 2 * alike["width"]


def test_the_smallest_gap_is_seen_in_four_of_five_samples():
    for pairs in (2, 4, 16):
        gap = smallest_gap_seen(2.0, pairs)
        draws = np.random.default_rng(pairs).normal(gap, 2.0, (20_000, pairs))
        seen = ttest_1samp(draws, 0, axis=1).pvalue < 0.05
        assert abs(seen.mean() - 0.8) < 0.012
