"""Calibration on errors whose truth is known, and against a numerical optimum."""

from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from vaalign_lib.rewards.calibration import (
    accuracy_after_dropping,
    coverage,
    error_by_deviation,
    fit_temperature,
    fit_temperature_to_labels,
    label_loss,
    rank_correlation,
)

RANDOM = np.random.default_rng(0)
VARIANCES = RANDOM.lognormal(0, 1, 20_000)
ERRORS = 3.0 * np.sqrt(VARIANCES) * RANDOM.normal(size=20_000)  # deviations three times as large


def test_temperature_is_the_maximum_of_the_normal_likelihood():
    loss = lambda log: -norm.logpdf(ERRORS, scale=np.exp(log) * np.sqrt(VARIANCES)).mean()  # noqa: E731
    best = np.exp(minimize_scalar(loss, bounds=(-3, 5), method="bounded", options={"xatol": 1e-9}).x)
    assert fit_temperature(ERRORS, VARIANCES) == pytest.approx(best, rel=1e-5)
    assert best == pytest.approx(3, rel=0.02)


def test_coverage_fails_before_and_holds_after_the_repair():
    before, after = coverage(ERRORS, VARIANCES), coverage(ERRORS, 9 * VARIANCES)
    assert (before["actual"] < before["nominal"] - 0.1).all()
    assert ((after["low"] < after["nominal"]) & (after["nominal"] < after["high"])).all()


def test_error_follows_deviation_bin_by_bin():
    bins = error_by_deviation(ERRORS, 9 * VARIANCES, bins=6)
    assert bins["count"].sum() == 20_000
    assert ((bins["low"] <= bins["predicted"]) & (bins["predicted"] <= bins["high"])).sum() >= 5
    assert bins["predicted"].is_monotonic_increasing


def test_intervals_of_errors_cover_as_often_as_they_say():
    held = []
    for _ in range(300):
        errors = RANDOM.normal(size=200)
        bins = error_by_deviation(errors, np.ones(200), bins=4)
        held += ((bins["low"] <= 1) & (bins["high"] >= 1)).tolist()
    assert 0.93 < np.mean(held) < 0.97


def test_rank_correlation_finds_what_is_there_and_covers_zero_where_nothing_is():
    assert rank_correlation(ERRORS, VARIANCES).low > 0.2
    covers = []
    for _ in range(300):
        found = rank_correlation(RANDOM.normal(size=80), RANDOM.lognormal(size=80))
        covers.append(found.low <= 0 <= found.high)
    assert 0.91 < np.mean(covers) < 0.985


def test_dropping_the_uncertain_keeps_the_right_ones():
    variances = np.arange(100.0)
    correct = variances < 50
    table = accuracy_after_dropping(correct, variances, (0.0, 0.1, 0.5)).set_index("dropped")
    assert table["count"].tolist() == [100, 90, 50]
    assert table["accuracy"].tolist() == pytest.approx([0.5, 50 / 90, 1.0])


def test_label_loss_is_near_the_integral():
    for gap, variance in ((0.5, 0.5), (2.0, 4.0), (-1.0, 1.0)):
        draws = gap + np.sqrt(variance) * RANDOM.normal(size=400_000)
        exact = (1 / (1 + np.exp(-draws))).mean()
        loss = partial(label_loss, np.array([gap]), np.array([variance]))
        assert np.exp(-loss(1.0)) == pytest.approx(exact, abs=0.015)
        assert loss(0) == pytest.approx(np.log1p(np.exp(-gap)))


def test_temperature_of_labels_recovers_the_uncertainty_that_made_them():
    variances = RANDOM.choice([0.1, 6.0], 100_000)
    estimate = RANDOM.normal(0, 2, 100_000)
    truth = estimate + 1.5 * np.sqrt(variances) * RANDOM.normal(size=100_000)
    wins = RANDOM.random(100_000) < 1 / (1 + np.exp(-truth))
    gaps = np.where(wins, estimate, -estimate)
    temperature = fit_temperature_to_labels(gaps, variances)
    near = [label_loss(gaps, variances, factor * temperature) for factor in (0.95, 1, 1.05)]
    assert near[1] == min(near)
    assert temperature == pytest.approx(1.5, rel=0.1)
    assert near[1] < label_loss(gaps, variances, 0) - 0.02


def test_fewer_errors_than_bins_have_a_bin_each():
    """One normal error of size e: its deviation lies from e / 2.241 to e / 0.0313 with 95%."""
    table = error_by_deviation(np.array([1.0, -2.0, 3.0, 4.0, 5.0]), np.arange(1.0, 6.0), bins=8)
    np.testing.assert_array_equal(table["count"], np.ones(5))
    np.testing.assert_array_equal(table["error"], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(table["predicted"], np.sqrt(np.arange(1.0, 6.0)))
    np.testing.assert_allclose(table["low"], table["error"] / norm.ppf(0.9875), rtol=1e-6)
    np.testing.assert_allclose(table["high"], table["error"] / norm.ppf(0.5125), rtol=1e-6)
