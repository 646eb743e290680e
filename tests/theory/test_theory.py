"""Theorems 2.2 and 2.4: closed forms against Monte Carlo, the box problem against a general solver."""

from fractions import Fraction

import cvxpy
import numpy as np
import pytest
from scipy.stats import norm

from vaalign_lib.theory import bounds
from vaalign_lib.theory.tabular import expected_reward, matched_epsilon, trust_region_policy


def draws_of(true_rewards, variances, count, seed):
    noise = np.random.default_rng(seed).standard_normal((count, len(true_rewards)))
    return true_rewards + np.sqrt(variances) * noise


# --- Theorem 2.2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_box_maximizer_matches_a_general_solver(seed):
    rng = np.random.default_rng(seed)
    arms = int(rng.integers(1, 8))
    estimates, variances = rng.normal(0, 2, arms), rng.lognormal(0, 1, arms)
    beta = rng.uniform(0, 3)
    d = cvxpy.Variable(arms)
    objective = estimates @ d - beta * cvxpy.norm(cvxpy.multiply(np.sqrt(variances), d))
    problem = cvxpy.Problem(cvxpy.Maximize(objective), [cvxpy.abs(d) <= 2])
    problem.solve(solver="CLARABEL")
    assert bounds.box_supremum(estimates, variances, beta) == pytest.approx(problem.value, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_box_supremum_equals_its_dual(seed):
    """min 2 ||R - u||_1 over ||u|| <= beta in the norm of the precisions (a second, dual program)."""
    rng = np.random.default_rng(seed)
    estimates, variances, beta = (rng.normal(0, 2, 5), rng.lognormal(0, 1, 5), rng.uniform(0.5, 3))
    u = cvxpy.Variable(5)
    distance = 2 * cvxpy.norm1(estimates - u)
    ball = cvxpy.norm(cvxpy.multiply(1 / np.sqrt(variances), u)) <= beta
    value = cvxpy.Problem(cvxpy.Minimize(distance), [ball]).solve(solver="CLARABEL")
    assert bounds.box_supremum(estimates, variances, beta) == pytest.approx(value, abs=1e-6)


def test_box_maximizer_at_the_ends():
    estimates = np.array([1.0, -2.0, 0.0])
    np.testing.assert_array_equal(bounds.box_maximizer(estimates, np.ones(3), 0.0), [2, -2, 0])
    np.testing.assert_array_equal(bounds.box_maximizer(estimates, np.ones(3), 2.3), np.zeros(3))
    assert bounds.box_supremum(estimates, np.ones(3), 0.0) == 2 * np.abs(estimates).sum()
    batch = bounds.box_supremum(np.stack([estimates, 2 * estimates]), np.ones(3), np.array([0.0, 1.0]))
    assert batch[1] == pytest.approx(bounds.box_supremum(2 * estimates, np.ones(3), 1.0))


def test_arms_leave_the_corner_where_computed():
    rng = np.random.default_rng(6)
    for _ in range(20):
        estimates, variances = rng.normal(0, 2, 5), rng.lognormal(0, 1, 5)
        betas = bounds.box_departures(estimates, variances)
        assert (np.argsort(betas) == np.argsort(np.abs(estimates) / variances)).all()
        for arm, beta in enumerate(betas):
            just = [bounds.box_maximizer(estimates, variances, beta * x)[arm] for x in (0.999, 1.001)]
            assert abs(just[0]) == pytest.approx(2) and abs(just[1]) < 2


@pytest.mark.parametrize("scale", [0.0, 0.5, 20.0])
@pytest.mark.parametrize(("arms", "beta"), [(1, 1.0), (2, 1.0), (3, 2.0), (10, 3.0)])
def test_sharp_bounds_hold_and_are_attained(arms, beta, scale):
    count = 40_000
    variances = np.random.default_rng(arms).lognormal(0, 1, arms)
    truth = scale * np.sqrt(variances)
    estimates = draws_of(truth, variances, count, seed=7)
    rate = bounds.lower_bound_event(estimates, truth, variances, beta).mean()
    low, high = bounds.lower_bound(arms, beta), bounds.upper_bound(beta)
    margin = 4 * np.sqrt(0.25 / count)
    assert low - margin < rate < high + margin
    if scale == 0:
        assert rate == pytest.approx(low, abs=margin)
    if scale == 20:
        assert rate == pytest.approx(high, abs=margin)


def test_norm_event_has_the_probability_of_the_lower_bound():
    noise = np.random.default_rng(0).standard_normal((200_000, 4))
    rate = (np.linalg.norm(noise, axis=1) <= 1.7).mean()
    assert bounds.lower_bound(4, 1.7) == pytest.approx(rate, abs=0.005)


def test_printed_and_proof_bounds():
    # hand calculation: 1 - exp(-2/4), 1 - exp(-4/2)
    assert bounds.printed_bound(2, 2.0) == pytest.approx(0.3934693402873666)
    assert bounds.proof_bound(2, 2.0) == pytest.approx(0.8646647167633873)
    beta = np.sqrt(5 * np.log(1 / 0.1))
    assert bounds.proof_bound(5, beta) == pytest.approx(0.9)
    # two arms: chi-square with two degrees of freedom is exponential, so the proof's bound is exact
    grid = np.linspace(0.1, 4, 20)
    np.testing.assert_allclose(bounds.proof_bound(2, grid), bounds.lower_bound(2, grid))


def test_printed_bound_is_violated_for_every_reward():
    """At n = 10, beta = 1 the printed bound exceeds even the sharp upper bound."""
    assert bounds.printed_bound(10, 1.0) > bounds.upper_bound(1.0)
    assert bounds.proof_bound(1, 2.0) > bounds.upper_bound(2.0)


def test_bounds_at_beta_zero_and_far_out():
    assert (bounds.printed_bound(3, 0), bounds.proof_bound(3, 0)) == (1, 0)
    assert (bounds.lower_bound(3, 0), bounds.upper_bound(0)) == (0, 0.5)
    assert (bounds.printed_bound(3, 1e200), bounds.proof_bound(3, 1e200)) == (0, 1)
    assert bounds.lower_bound(3, 1e200) == 1


def test_an_arm_without_estimate_is_never_at_its_corner():
    estimates, variances = np.array([1.0, 0, -2]), np.array([1.0, 1, 4])
    betas = bounds.box_departures(estimates, variances)
    kept = bounds.box_departures(estimates[[0, 2]], variances[[0, 2]])
    np.testing.assert_array_equal(betas, [kept[0], 0, kept[1]])
    np.testing.assert_array_equal(bounds.box_departures([0.0, 0.0], 1.0), [0, 0])
    both = bounds.box_departures(np.stack([estimates, 2 * estimates]), variances)
    np.testing.assert_allclose(both, [betas, 2 * betas])


def test_the_box_knows_no_units():
    rng = np.random.default_rng(1)
    estimates, variances = rng.normal(size=(50, 4)), rng.lognormal(size=(50, 4))
    expected = bounds.box_maximizer(estimates, variances, 0.7)
    for scale in (1e-200, 1e200):
        scaled = bounds.box_maximizer(scale * estimates, variances, scale * 0.7)
        np.testing.assert_allclose(scaled, expected, atol=1e-9)


# --- Theorem 2.4 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["free", "sum_to_one"])
@pytest.mark.parametrize("seed", range(5))
def test_risk_formulas_match_simulated_policies(form, seed):
    rng = np.random.default_rng(seed)
    arms, count = int(rng.integers(2, 7)), 100_000
    truth, variances = rng.normal(0, 1, arms), rng.lognormal(0, 1, arms)
    reference, epsilon = rng.dirichlet(np.ones(arms)), rng.uniform(0.01, 2)
    estimates = draws_of(truth, variances, count, seed + 100)
    baseline = expected_reward(reference, truth)
    for risk, weights, radius in (
        (bounds.vanilla_risk, np.ones(arms), epsilon),
        (bounds.variance_aware_risk, variances, matched_epsilon(variances, epsilon)),
    ):
        policy = trust_region_policy(estimates, reference, radius, variances=weights, form=form)
        simulated = (expected_reward(policy, truth) <= baseline).mean()
        expected = risk(truth, variances, form)
        assert simulated == pytest.approx(expected, abs=4.5 * np.sqrt(0.25 / count))


@pytest.mark.parametrize("form", ["free", "sum_to_one"])
def test_theorem_24_holds_for_every_instance(form):
    rng = np.random.default_rng(3)
    for arms in (2, 3, 5, 20):
        truth = rng.normal(0, rng.uniform(0.01, 5, (20_000, 1)), (20_000, arms))
        variances = rng.lognormal(0, 1.5, (20_000, arms))
        gap = bounds.variance_aware_risk(truth, variances, form) - bounds.vanilla_risk(truth, variances, form)
        assert gap.max() < 1e-12


def test_risk_without_signal_is_one():
    assert bounds.vanilla_risk([0.0, 0.0], [1.0, 2.0]) == 1
    assert bounds.variance_aware_risk([3.0, 3.0], [1.0, 2.0], "sum_to_one") == 1
    assert bounds.vanilla_risk([3.0, 3.0], [1.0, 2.0], "sum_to_one") == 1


@pytest.mark.parametrize("risk", [bounds.vanilla_risk, bounds.variance_aware_risk])
@pytest.mark.parametrize("arms", [1, 2, 3, 7, 100])
def test_equal_rewards_are_no_signal_however_they_round(risk, arms):
    """Where probabilities sum to one no policy gains on equal rewards: it returns what pi_0 does."""
    rng = np.random.default_rng(arms)
    for reward in (0.1, 1 / 3, 1e-200, 1e200, *rng.normal(size=20)):
        variances = rng.lognormal(0, 3, arms)
        assert risk(np.full(arms, reward), variances, "sum_to_one") == 1
    assert risk([0.3, 0.1 + 0.2], [1.0, 2.0], "sum_to_one") == 1
    assert risk([1e13, 1e13 + 1], [1.0, 1.0], "sum_to_one") < 0.3  # a difference, not rounding


def test_risks_by_exact_fractions():
    """Signals over noise as fractions, from the formulas of Appendix A and by hand for the sum to one."""
    rewards, variances = ([Fraction(1), Fraction(2), Fraction(4)], [Fraction(1), Fraction(3), Fraction(2)])
    floats = [float(x) for x in rewards], [float(x) for x in variances]

    def moments(r):
        return sum(x * x for x in r), sum(v * x * x for v, x in zip(variances, r, strict=True))

    def less(centre):
        return [x - centre for x in rewards]

    precision = [1 / v for v in variances]
    centre = sum(p * x for p, x in zip(precision, rewards, strict=True)) / sum(precision)
    for form, vanilla, aware in (
        ("free", rewards, rewards),
        ("sum_to_one", less(sum(rewards) / 3), less(centre)),
    ):
        square, noise = moments(vanilla)
        signal = sum(p * x * x for p, x in zip(precision, aware, strict=True))
        expected = (norm.cdf(-float(square) / np.sqrt(float(noise))), norm.cdf(-np.sqrt(float(signal))))
        found = bounds.vanilla_risk(*floats, form), bounds.variance_aware_risk(*floats, form)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["free", "sum_to_one"])
def test_risks_broadcast_and_know_no_units(form):
    rng = np.random.default_rng(2)
    rewards, variances = rng.normal(size=3), rng.lognormal(size=(5, 3))
    for risk in (bounds.vanilla_risk, bounds.variance_aware_risk):
        many = risk(rewards, variances, form)
        assert many.shape == (5,)
        assert many[3] == risk(rewards, variances[3], form)
        np.testing.assert_allclose(risk(1e-140 * rewards, 1e-280 * variances, form), many)
        np.testing.assert_allclose(risk(1e140 * rewards, 1e280 * variances, form), many)
    assert bounds.vanilla_risk([1, 2, 3], np.ones((5, 3))) == pytest.approx(norm.cdf(-np.sqrt(14)))
    assert bounds.vanilla_risk([1e-200, 0.0], 1.0) == pytest.approx(0.5)  # a weak signal is one
    # the limit of an arm without noise: its reward is the mean, only the other one is a signal
    assert bounds.variance_aware_risk([1, 2], [1e-40, 1], "sum_to_one") == pytest.approx(norm.cdf(-1))


def test_theorem_24_fails_on_the_simplex():
    """r* = (0, 1, 1), variances (1, 4, 4), epsilon 2/3: the variance-aware policy is the riskier one."""
    truth, variances, reference = (np.array([0.0, 1, 1]), np.array([1.0, 4, 4]), np.ones(3) / 3)
    estimates = draws_of(truth, variances, 50_000, seed=11)
    vanilla = trust_region_policy(estimates, reference, 2 / 3)
    aware = trust_region_policy(estimates, reference, matched_epsilon(variances, 2 / 3), variances=variances)
    risks = [(expected_reward(policy, truth) <= 2 / 3).mean() for policy in (vanilla, aware)]
    assert risks[1] - risks[0] > 0.1


def test_up_to_the_interior_epsilon_the_simplex_never_binds():
    rng = np.random.default_rng(4)
    estimates, variances = rng.normal(size=(5000, 4)), rng.lognormal(0, 1, 4)
    for reference in rng.dirichlet(np.full(4, 3.0), 5):
        epsilon = bounds.interior_epsilon(reference)
        for weights, radius in ((np.ones(4), epsilon), (variances, matched_epsilon(variances, epsilon))):
            free = trust_region_policy(estimates, reference, radius, variances=weights, form="sum_to_one")
            assert free.min() >= -1e-12
        beyond = trust_region_policy(estimates, reference, 1.5 * epsilon, form="sum_to_one")
        assert beyond.min() < 0
    assert bounds.interior_epsilon(np.ones(4) / 4) == pytest.approx(1 / 12)


def test_normal_tails_are_those_of_draws():
    gains = 0.7 * (1 + np.random.default_rng(0).standard_normal(2_000_000) / 1.3)
    cvar, loss = bounds.normal_tails(0.7, 1.3, 0.1)
    assert cvar == pytest.approx(np.sort(gains)[:200_000].mean(), abs=3e-3)
    assert loss == pytest.approx(np.maximum(-gains, 0).mean(), rel=0.02)


@pytest.mark.parametrize("form", ["free", "sum_to_one"])
def test_signals_are_those_of_linear_steps_and_make_the_better_tails(form):
    rng = np.random.default_rng(5)
    rewards, variances = rng.normal(size=(200, 4)), rng.lognormal(0, 1, (200, 4))
    signals = [of(rewards, variances, form) for of in (bounds.vanilla_signal, bounds.variance_aware_signal)]
    assert (signals[1] >= signals[0] * (1 - 1e-12)).all() and (signals[1] > 1.05 * signals[0]).any()
    for level in (0.01, 0.1, 0.5, 1.0):
        tails = [np.array(bounds.normal_tails(1.0, signal, level)) for signal in signals]
        assert (tails[1][0] >= tails[0][0] - 1e-9).all() and (tails[1][1] <= tails[0][1] + 1e-12).all()
    if form == "free":
        estimates = draws_of(rewards[0], variances[0], 200_000, seed=6)
        for signal, weights in zip(signals, (np.ones(4), variances[0]), strict=True):
            gains = estimates @ (rewards[0] / weights)
            assert gains.mean() / gains.std() == pytest.approx(signal[0], rel=0.02)
