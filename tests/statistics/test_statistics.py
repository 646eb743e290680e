"""Estimates, intervals and tests against known values and simulated coverage and size."""

import numpy as np
import pytest
from scipy.stats import binom, hypergeom, levene, norm, ttest_1samp
from statsmodels.stats.weightstats import ttost_ind

from vaalign_lib.statistics.tests import (
    Estimate,
    bca,
    boschloo,
    brown_forsythe,
    difference,
    equivalence,
    f_test,
    holm,
    mean,
    mean_of,
    median,
    paired_brown_forsythe,
    paired_variance_ratio,
    permuted_variance_ratio,
    proportion,
    proportion_difference,
    smallest_margin,
    two_proportions,
    variance,
    variance_ratio,
    welch,
)


def coverage(estimate, truth, samples):
    inside = [(e := estimate(sample)).low <= truth <= e.high for sample in samples]
    return np.mean(inside)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((22.23, 12.22, 40.46), "22 [12, 40]"),
        ((0.5705, 0.2488, 1.737), "0.57 [0.25, 1.74]"),
        ((0.01228, 0.0007716, 0.02378), "0.012 [0.001, 0.024]"),
        ((1.0001, 0.7087, 1.377), "1.00 [0.71, 1.38]"),
        ((1.4, 1.004, 1.9), "1.400 [1.004, 1.900]"),  # above 1, and so it reads
        ((43.4, 0.95, 100.2), "43.4 [0.9, 100.2]"),
        ((0.0, -0.046, 0.046), "0.000 [-0.046, 0.046]"),
        ((12345.6, 10000, 15000), "12346 [10000, 15000]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((2.0, 1.0, np.inf), "2 [1, inf]"),
        ((np.nan, 0.0, 1.0), "not found"),
        ((np.nan, np.nan, np.nan), "not found"),
    ],
)
def test_estimates_are_told_as_precisely_as_they_are_known(numbers, told):
    assert str(Estimate(*numbers, 5)) == told


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


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_of_a_mean_is_students_and_covers(count):
    """The normal one covers in .685 of samples of two, .85 of three and .91 of ten."""
    samples = np.random.default_rng(count).normal(size=(2000, count))
    assert abs(coverage(mean, 0, samples) - 0.95) < 4 * np.sqrt(0.05 * 0.95 / 2000)
    found, expected = mean(samples[0]), ttest_1samp(samples[0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_variance_is_bonetts_and_covers():
    """Bonett (2006) finds .9590, .9417 and .9523 for 10, 20 and 80 normal samples."""
    random = np.random.default_rng(0)
    for count in (5, 10, 80):
        share = coverage(variance, 1, random.normal(size=(600, count)))
        assert share > 0.925 and (share < 0.975 or count == 5), (count, share)
    heavy = coverage(variance, 5 / 3, random.standard_t(5, size=(600, 10)))
    assert heavy > 0.91  # the exact interval of normal samples has .875
    found = variance(samples := random.normal(size=30))
    scaled = variance(3 * samples + 5)
    assert (scaled.low, scaled.high) == pytest.approx((9 * found.low, 9 * found.high))
    assert found.value == samples.var(ddof=1) and found.low < found.value < found.high
    assert np.isnan([(flat := variance([2.0, 2.0, 2.0])).low, flat.high]).all() and flat.value == 0


def test_a_difference_of_estimates_has_welchs_width_where_both_are_symmetric():
    first, second = Estimate(3.0, 1.0, 5.0, 9), Estimate(1.0, -0.5, 2.5, 9)
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, -0.5, 4.5))  # 3-4-5
    skewed = difference(Estimate(3.0, 2.9, 7.0, 9), Estimate(1.0, 0.0, 1.1, 9))
    assert skewed.high - 2 == pytest.approx(np.hypot(4, 1))
    assert 2 - skewed.low == pytest.approx(np.hypot(0.1, 0.1))


@pytest.mark.parametrize("count", [6, 10, 20, 101])
def test_median_interval_covers_exactly_as_the_binomial_says(count):
    """x_(l) to x_(n+1-l) covers with 1 - 2 P(Bin(n, 1/2) < l), at least 95% and tight."""
    estimate = median(np.arange(1, count + 1))
    low = int(estimate.low)
    assert estimate.high == count + 1 - low
    assert 1 - 2 * binom.cdf(low - 1, count, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(low, count, 0.5) < 0.95


def test_ratio_of_pairs_knows_the_pairing():
    rng = np.random.default_rng(1)
    a = rng.normal(size=5000)
    wide = paired_variance_ratio(a, rng.normal(size=5000))
    narrow = paired_variance_ratio(a, 2 * a + 0.01 * rng.normal(size=5000))
    assert narrow.value == pytest.approx(0.25, rel=1e-3)
    assert (narrow.high - narrow.low) / narrow.value < 0.05 * (wide.high - wide.low) / wide.value


def test_a_paired_test_sees_what_the_other_misses():
    random = np.random.default_rng(4)
    a = random.normal(size=80)
    b = 1.15 * a + 0.05 * random.normal(size=80)
    assert paired_brown_forsythe(a, b) < 1e-6 and brown_forsythe([a], [b]) > 0.05
    null = [paired_brown_forsythe(*random.normal(size=(2, 80))) for _ in range(1000)]
    assert paired_brown_forsythe([0.1, 0.4], [0.3, 0.9]) == 1  # smallest stacks say nothing
    assert paired_brown_forsythe([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == 1  # nor do equal ones
    assert brown_forsythe([[0.1, 0.4]], [[0.3, 0.9]]) == 1
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


def test_holm_by_hand_and_by_its_definition():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    p_values = np.random.default_rng(0).random(40) ** 4
    expected = [  # a hypothesis falls with all of smaller p-values, each at its own level
        min(1, max((p_values >= q).sum() * q for q in p_values[p_values <= p])) for p in p_values
    ]
    np.testing.assert_allclose(holm(p_values), expected)


# --- differences, ratios, tests -----------------------------------------------------------------------

# R's `sleep` (Student 1908); t.test and var.test of extra ~ group print what is compared with
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def summary(*samples):
    return [number for one in samples for number in (np.mean(one), np.var(one, ddof=1), len(one))]


def variances(*samples):
    return [number for one in samples for number in (np.var(one, ddof=1), len(one))]


def test_welch_and_f_as_r_prints_them():
    found = welch(*summary(*SLEEP))
    assert (found.statistic, found.degrees) == pytest.approx((-1.8608, 17.776), rel=1e-4)
    assert found.p == pytest.approx(0.07939, rel=1e-3)
    ratio, tested = variance_ratio(*variances(*SLEEP)), f_test(*variances(*SLEEP))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.79834, 0.198297, 3.214123), rel=1e-4)
    assert tested.p == pytest.approx(0.7427, rel=1e-3)
    # tables of the t and F distributions
    assert welch(0, 1, 80, 1, 1, 80).critical == pytest.approx(1.975, abs=5e-4)
    assert f_test(1, 61, 1, 61).critical == pytest.approx(1.67, abs=5e-3)


def test_f_and_its_interval_agree_and_do_not_depend_on_the_order():
    a, b = np.random.default_rng(0).normal(size=(2, 30)) * [[1.7], [1]]
    there, back = f_test(*variances(a, b)), f_test(*variances(b, a))
    assert there.p == pytest.approx(back.p) and there.statistic == pytest.approx(1 / back.statistic)
    edge = variance_ratio(*variances(a, b)).low  # at the end of the interval p is 5%
    assert f_test(a.var(ddof=1) / edge, 30, b.var(ddof=1), 30).p == pytest.approx(0.05)


def test_two_proportions_by_hand():
    found = two_proportions(15, 50, 5, 50)  # pooled 0.2, error sqrt(0.16 / 25) = 0.08, z = 2.5
    assert (found.statistic, found.p) == pytest.approx((2.5, norm.sf(2.5)))
    assert two_proportions(0, 80, 0, 80).p == 0.5


def test_newcombes_interval_as_published():
    """Newcombe (1998), Statistics in Medicine 17, 873-890, Table II, method 10."""
    for events, low, high in (
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((5, 56, 0, 29), -0.0381, 0.1926),
    ):
        found = proportion_difference(*events)
        assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_the_mean_of_intervals_covers_also_rows_that_err_together():
    random, truth = np.random.default_rng(2), np.array([0.3, 0.05, 0.0, 0.1])
    others = np.array([0.1, 0.02, 0.01, 0.3])
    covered = {"independent": 0, "together": 0}
    for _ in range(500):
        for kind in covered:
            shape = (2, 4, 80) if kind == "independent" else (2, 1, 80)
            drawn = random.random(shape)
            first, second = (drawn < np.stack([others + truth, others])[..., None]).sum(axis=-1)
            pairs = zip(first.tolist(), second.tolist(), strict=True)
            found = mean_of([proportion_difference(a, 80, b, 80) for a, b in pairs])
            covered[kind] += found.low <= truth.mean() <= found.high
    assert covered["together"] / 500 > 0.925 and covered["independent"] / 500 > 0.97
    one = proportion_difference(3, 10, 2, 10)
    assert mean_of([one]) == one
    nothing = mean_of([proportion_difference(0, 80, 0, 80)] * 7)
    assert nothing.low < 0 == nothing.value < nothing.high


def test_equivalence_is_statsmodels_tost():
    random = np.random.default_rng(3)
    for shift in (0.0, 0.2, -0.6):
        a, b = random.normal(size=40), 2 * random.normal(size=60) + shift
        found = equivalence(*summary(a, b), margin=0.7)
        p, *_ = ttost_ind(a, b, -0.7, 0.7, usevar="unequal")
        assert found.p == pytest.approx(p)
        edge = smallest_margin(*summary(a, b))
        assert equivalence(*summary(a, b), margin=edge).p == pytest.approx(0.05)


def boschloo_by_enumeration(a, n, b, m):
    """sup over p of the probability that Fisher's p is at most the one observed."""

    def fisher(i, j):
        return hypergeom.sf(i - 1, n + m, i + j, n)

    grid = np.linspace(0, 1, 2001)
    chance = np.zeros_like(grid)
    for i in range(n + 1):
        for j in range(m + 1):
            if fisher(i, j) <= fisher(a, b) * (1 + 1e-9):
                chance += binom.pmf(i, n, grid) * binom.pmf(j, m, grid)
    return chance.max()


@pytest.mark.parametrize("events", [(7, 10, 2, 12), (4, 9, 4, 9), (1, 8, 6, 8), (0, 5, 0, 7)])
def test_boschloo_by_enumeration(events):
    assert boschloo(*events) == pytest.approx(boschloo_by_enumeration(*events), abs=2e-3)


def test_tests_keep_their_size():
    """Under the null hypothesis p is below 5% in 5% of samples: 4 Monte Carlo errors to either side."""
    random, repeats = np.random.default_rng(4), 700
    margin = 4 * np.sqrt(0.05 * 0.95 / repeats)
    found = {"f": [], "welch": [], "equivalence": []}
    for _ in range(repeats):
        a, b = random.normal(size=80), 1.3 * random.normal(size=80)
        found["f"].append(f_test(*variances(1.3 * a, b)).p)
        found["welch"].append(welch(*summary(a, b)).p)
        found["equivalence"].append(equivalence(*summary(a, b + 0.6), margin=0.6).p)
    for name, p_values in found.items():
        assert abs(np.mean(np.array(p_values) < 0.05) - 0.05) < margin, name


def test_the_permutation_test_keeps_its_size_where_f_does_not():
    random, p_values, f_values, repeats = np.random.default_rng(5), [], [], 700
    for _ in range(repeats):
        a, b = random.standard_t(4, size=(2, 80))
        p_values.append(permuted_variance_ratio(a, b, permutations=99).p)
        f_values.append(f_test(*variances(a, b)).p)
    margin = 4 * np.sqrt(0.05 * 0.95 / repeats)
    assert abs(np.mean(np.array(p_values) <= 0.05) - 0.05) < margin
    assert np.mean(np.array(f_values) < 0.05) > 0.1  # heavy tails
    powerful = permuted_variance_ratio(2 * random.normal(size=80), random.normal(size=80))
    assert powerful.p < 0.001 and powerful.statistic > powerful.critical


def test_bca_intervals_cover_and_know_skewness():
    random, covered, above = np.random.default_rng(6), 0, 0
    for k in range(400):
        values = random.exponential(size=(1, 60))
        value, low, high = bca([values], lambda x: x.mean(axis=-1), resamples=1000, seed=k)
        covered += low[0] <= 1 <= high[0]
        above += high[0] - value[0] > value[0] - low[0]
    assert 0.91 < covered / 400 < 0.975
    assert above >= 390


def test_bca_draws_strata_apart():
    """The error of a difference of independent means, though the samples are the same but for a shift."""
    a = np.random.default_rng(7).normal(size=50)
    _, low, high = bca([a, a + 1], lambda x, y: x.mean(axis=-1) - y.mean(axis=-1), resamples=2000)
    assert high - low == pytest.approx(2 * 1.96 * a.std() * np.sqrt(2 / 50), rel=0.1)
    _, low, high = bca([np.ones(5)], lambda x: x.mean(axis=-1))
    assert np.isnan([low, high]).all()
