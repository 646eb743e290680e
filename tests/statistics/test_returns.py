"""Variances of returns and their ratios, decomposition and risk, against simulations and definitions."""

import numpy as np
import pytest
from scipy.stats import norm

from vaalign_lib.statistics.returns import (
    LEVELS,
    RISK_MEASURES,
    Returns,
    _resampled,
    decomposition,
    risk,
    risk_measures,
    risk_table,
    training_variance_ratio,
    training_variance_test,
)
from vaalign_lib.statistics.tests import f_test, proportion


def stack(random, size, training, noise):
    error = np.full(size, np.sqrt(noise))
    values = random.normal(3, np.sqrt(training), size) + random.normal(0, error)
    return Returns(values, error)


def test_the_variance_of_returns_falls_into_training_and_noise():
    parts = stack(np.random.default_rng(0), 200_000, 0.4, 0.1)
    assert parts.total == pytest.approx(0.5, rel=0.02)
    assert parts.noise == pytest.approx(0.1) and parts.training == pytest.approx(0.4, rel=0.02)
    assert Returns([1, 2], [0, 0]).total == 0.5  # lists will do


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


def test_risk_carries_the_error_of_the_bar():
    returns, reference = np.linspace(-1, 1, 80), np.full(80, -0.5) + np.tile([-1e-9, 1e-9], 40)
    sharp = risk(returns, reference)
    assert sharp.value == (returns <= -0.5).mean()
    exact = proportion(returns <= -0.5)
    assert (sharp.low, sharp.high) == (exact.low, exact.high)
    vague = risk(returns, reference + np.tile([-1.0, 1.0], 40))
    assert vague.low < sharp.low and vague.high > sharp.high


# --- decomposition and tests --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 80])
def test_the_decomposition_covers(size):
    random, repeats = np.random.default_rng(6), 500
    covered = dict.fromkeys(("total", "training", "noise"), 0)
    for _ in range(repeats):
        errors = np.sqrt(0.1 * random.gamma(4, 1 / 4, size))
        values = random.normal(3, np.sqrt(0.4), size) + random.normal(0, errors)
        parts = decomposition(Returns(values, errors))
        for name, truth in (("total", 0.5), ("training", 0.4), ("noise", 0.1)):
            covered[name] += parts[name].low <= truth <= parts[name].high
        assert parts["training"].value == parts["total"].value - parts["noise"].value
    assert all(0.92 < count / repeats < 0.98 for count in covered.values()), covered


def test_the_decomposition_knows_errors_that_are_all_alike():
    parts = decomposition(stack(np.random.default_rng(3), 80, 0.4, 0.1))
    noise, total, training = (parts[name] for name in ("noise", "total", "training"))
    assert (noise.low, noise.high) == pytest.approx((0.1, 0.1))
    assert (training.low, training.high) == pytest.approx((total.low - 0.1, total.high - 0.1))


def test_the_test_of_training_variances_keeps_its_size_where_f_of_totals_does_not():
    random, p_values, of_totals, repeats = np.random.default_rng(7), [], [], 700
    for _ in range(repeats):
        a, b = stack(random, 80, 0.2, 0.05), stack(random, 80, 0.2, 0.3)
        p_values.append(training_variance_test(a, b).p)
        of_totals.append(f_test(a.total, 80, b.total, 80).p)
    assert abs(np.mean(np.array(p_values) < 0.05) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / repeats)
    assert np.mean(np.array(of_totals) < 0.05) > 0.5
    a, b = stack(random, 80, 0.5, 0.1), stack(random, 80, 0.1, 0.1)
    for other in (b, stack(random, 80, 0.4, 0.1), stack(random, 80, 0.7, 0.1)):
        p = f_test(a.total, 80, other.total, 80).p
        assert training_variance_test(a, other).p == pytest.approx(p, rel=0.15, abs=1e-6)
    assert training_variance_test(a, b).p < 1e-3
    only_noise = stack(random, 80, 0, 0.1)
    assert training_variance_test(only_noise, stack(random, 80, 0, 0.1)).p > 1e-3


# --- risk ---------------------------------------------------------------------------------------------


def test_risk_measures_by_their_definitions():
    random = np.random.default_rng(8)
    returns, reference = random.normal(1, 2, 83), random.normal(0, 1, 80)
    gains = returns - reference.mean()
    found = dict(zip(RISK_MEASURES, risk_measures(returns, reference), strict=True))
    for level in LEVELS:
        # Rockafellar and Uryasev: the largest t - E[(t - X)+] / level, attained at a sample
        tail = max(t - np.maximum(t - gains, 0).mean() / level for t in gains)
        assert found[f"cvar_{100 * level:.0f}"] == pytest.approx(tail)
        assert found[f"quantile_{100 * level:.0f}"] == pytest.approx(np.quantile(gains, level))
    assert found["mean_regret"] == pytest.approx(-gains[gains < 0].sum() / 83)
    assert found["sharpe"] == pytest.approx(gains.mean() / returns.std(ddof=1))


def test_risk_measures_of_many_resamples_are_those_of_each():
    random = np.random.default_rng(9)
    returns, reference = random.normal(size=(3, 5, 20)), random.normal(size=(3, 5, 30))
    everything = risk_measures(returns, reference)
    assert everything.shape == (len(RISK_MEASURES), 3, 5)
    one = risk_measures(returns[2, 1], reference[2, 1])
    np.testing.assert_allclose(everything[:, 2, 1], one)


def test_intervals_of_risk_measures_cover():
    """For normal gains: CVaR = mean - SD phi(z) / level, Sharpe = mean / SD."""
    random, truth = np.random.default_rng(10), {"sharpe": 1.0}
    for level in LEVELS:
        z = norm.ppf(level)
        truth[f"cvar_{100 * level:.0f}"] = 1 - norm.pdf(z) / level
        truth[f"quantile_{100 * level:.0f}"] = 1 + z
    covered = dict.fromkeys(truth, 0)
    for seed in range(200):
        pair = random.normal(1, 1, 80), random.normal(0, 0.2, 80)
        table = risk_table({"one": pair}, resamples=1000, seed=seed).set_index("measure")
        for name, value in truth.items():
            covered[name] += table.loc[name, "low"] <= value <= table.loc[name, "high"]
    assert 0.7 < covered.pop("cvar_5") / 200 < 0.9  # as its docstring says
    assert all(0.88 < count / 200 < 0.99 for count in covered.values()), covered


def test_the_worst_is_what_was_seen_and_may_be_worse():
    values = np.linspace(-1, 1, 80)
    table = risk_table({"a": (values, np.zeros(80)), "b": (values + 5, np.zeros(80))})
    worst = table[table["measure"] == "worst_regret"].set_index("stack")
    assert worst.loc["a", "value"] == 1 and worst.loc["b", "value"] == -4
    assert np.isinf(worst["high"]).all()
    no_loss = table.set_index(["stack", "measure"]).loc[("b", "mean_regret")]
    assert no_loss["value"] == 0 and np.isnan(no_loss["low"])
