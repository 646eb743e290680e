"""Estimates and intervals against known values and simulated coverage."""

import numpy as np
import pytest
from scipy.stats import binom, levene

from vaalign_lib.statistics import (
    Returns,
    _resampled,
    brown_forsythe,
    holm,
    mean,
    median,
    paired_brown_forsythe,
    paired_variance_ratio,
    proportion,
    risk,
    training_variance_ratio,
)


def coverage(estimate, truth, samples):
    inside = [(e := estimate(sample)).low <= truth <= e.high for sample in samples]
    return np.mean(inside)


def test_clopper_pearson_known_values():
    # 1 of 1,000 and 2 of 1,000: binom.test in R gives 2.5317e-05..0.0055589 and 0.00024231..0.0072058
    one, two = (proportion(np.arange(1000) < k) for k in (1, 2))
    assert (one.value, one.count) == (0.001, 1000)
    assert (one.low, one.high) == pytest.approx((2.5317e-05, 0.0055589), rel=1e-3)
    assert (two.low, two.high) == pytest.approx((0.00024231, 0.0072058), rel=1e-3)
    assert proportion([False] * 50).low == 0


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    margin = 4 * np.sqrt(0.05 * 0.95 / 2000)
    assert abs(coverage(mean, 0.5, rng.random((2000, 200))) - 0.95) < margin
    assert coverage(median, np.log(2), rng.exponential(size=(2000, 101))) > 0.95 - margin
    skewed = rng.exponential(size=(2000, 500)) ** 1.2
    shared = rng.normal(size=(2000, 500))
    pairs = zip(skewed + shared, 0.5 * shared + rng.normal(size=(2000, 500)), strict=True)
    from scipy.special import gamma

    ratio = (gamma(3.4) - gamma(2.2) ** 2 + 1) / 1.25
    assert 0.90 < coverage(lambda pair: paired_variance_ratio(*pair), ratio, pairs) < 0.97


@pytest.mark.parametrize("count", [6, 10, 20, 101])
def test_median_interval_covers_exactly_as_the_binomial_says(count):
    """x_(l) to x_(n+1-l) covers with 1 - 2 P(Bin(n, 1/2) < l), at least 95% and tight."""
    estimate = median(np.arange(1, count + 1))
    low = int(estimate.low)
    assert estimate.high == count + 1 - low
    assert 1 - 2 * binom.cdf(low - 1, count, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(low, count, 0.5) < 0.95


def test_too_few_samples_for_a_median_interval():
    with pytest.raises(ValueError, match="5 are too few"):
        median(np.arange(5))


def test_ratio_of_pairs_knows_the_pairing():
    rng = np.random.default_rng(1)
    a = rng.normal(size=5000)
    wide = paired_variance_ratio(a, rng.normal(size=5000))
    narrow = paired_variance_ratio(a, 2 * a + 0.01 * rng.normal(size=5000))
    assert narrow.value == pytest.approx(0.25, rel=1e-3)
    assert (narrow.high - narrow.low) / narrow.value < 0.05 * (wide.high - wide.low) / wide.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean([1.0]), "samples: .*at least two"),
        (lambda: mean([1.0, np.nan]), "samples: must be finite"),
        (lambda: median([[1.0, 2.0]]), "samples: expected a vector"),
        (lambda: proportion([]), "events"),
        (lambda: paired_variance_ratio([1, 2, 3], [1, 2]), "denominator: expected 3"),
        (lambda: paired_variance_ratio([1, 2, 3], [1, 1, 1]), "all samples are equal"),
    ],
)
def test_bad_input_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- returns of trained policies ----------------------------------------------------------------------


def stack(random, size, training, noise):
    error = np.full(size, np.sqrt(noise))
    values = random.normal(3, np.sqrt(training), size) + random.normal(0, error)
    return Returns(values, error)


def test_the_variance_of_returns_falls_into_training_and_noise():
    parts = stack(np.random.default_rng(0), 200_000, 0.4, 0.1)
    assert parts.total == pytest.approx(0.5, rel=0.02)
    assert parts.noise == pytest.approx(0.1) and parts.training == pytest.approx(0.4, rel=0.02)
    with pytest.raises(ValueError, match="errors: expected 2 numbers"):
        Returns(np.array([1.0, 2.0]), np.array([0.1]))


def draws(random, size, resamples=400, stacks=1):
    return [random.integers(size, size=(resamples, size)) for _ in range(stacks)]


def test_intervals_of_ratios_of_training_variances_cover():
    random, covered, above = np.random.default_rng(1), 0, 0
    for _ in range(300):
        first = [stack(random, 80, 0.4, 0.1), stack(random, 80, 0.4, 0.1)]
        second = [stack(random, 80, 0.2, 0.1), stack(random, 80, 0.2, 0.1)]
        found = training_variance_ratio(first, second, draws(random, 80, stacks=2))
        covered += found.low <= 2 <= found.high
        above += found.value > 2
    assert 0.9 <= covered / 300 <= 0.985  # the bootstrap of 80 is a little short
    assert 0.38 <= above / 300 <= 0.62


def test_resamples_are_centred_on_the_sample():
    random = np.random.default_rng(5)
    a, b = stack(random, 10, 1.0, 0.1), stack(random, 10, 0.5, 0.1)
    rows = draws(random, 10, 20_000)
    parts = [_resampled(one, rows[0])[0].mean() for one in (a, b)]
    np.testing.assert_allclose(parts, [a.training, b.training], rtol=0.02)


def test_the_ratio_of_the_same_policies_is_one_without_doubt():
    random = np.random.default_rng(0)
    one = stack(np.random.default_rng(2), 50, 1.0, 0.1)
    found = training_variance_ratio([one], [one], draws(random, 50))
    assert (found.low, found.value, found.high) == (1, 1, 1) and found.measurable
    short = stack(np.random.default_rng(2), 20, 1.0, 0.1)
    with pytest.raises(ValueError, match="same size"):
        training_variance_ratio([one], [short], draws(random, 50))


def test_a_training_variance_below_the_noise_is_not_called_measured():
    random = np.random.default_rng(0)
    one, noise = stack(random, 80, 1.0, 0.1), stack(random, 80, 0.001, 0.1)
    found = training_variance_ratio([one], [noise], draws(random, 80))
    assert found.floored > 0.2 and not found.measurable and "not above the noise" in str(found)


def test_a_paired_test_sees_what_the_other_misses():
    random = np.random.default_rng(4)
    a = random.normal(size=80)
    b = 1.15 * a + 0.05 * random.normal(size=80)
    assert paired_brown_forsythe(a, b) < 1e-6 and brown_forsythe([a], [b]) > 0.05
    null = [paired_brown_forsythe(*random.normal(size=(2, 80))) for _ in range(1000)]
    assert 0.03 < np.mean(np.array(null) < 0.05) < 0.07


def test_brown_forsythe_is_scipys_for_one_stack_and_keeps_its_size_for_two():
    random = np.random.default_rng(3)
    a, b = random.normal(size=60), random.normal(0, 1.4, 60)
    assert brown_forsythe([a], [b]) == pytest.approx(levene(a, b, center="median").pvalue)
    p_values = []
    for _ in range(1000):  # equal spread, but the stacks' means differ
        drawn = random.standard_t(5, size=(4, 80)) + np.array([[0], [3], [-2], [1]])
        p_values.append(brown_forsythe(drawn[:2], drawn[2:]))
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.07


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_risk_carries_the_error_of_the_bar():
    returns, reference = np.linspace(-1, 1, 80), np.full(80, -0.5) + np.tile([-1e-9, 1e-9], 40)
    sharp = risk(returns, reference)
    assert sharp.value == (returns <= -0.5).mean()
    exact = proportion(returns <= -0.5)
    assert (sharp.low, sharp.high) == (exact.low, exact.high)
    vague = risk(returns, reference + np.tile([-1.0, 1.0], 40))
    assert vague.low < sharp.low and vague.high > sharp.high
