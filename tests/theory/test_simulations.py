"""The simulations of notebook 02 against closed forms and by their own invariants."""

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import dblquad
from scipy.stats import norm

from vaalign_lib.theory import bounds, simulations, tabular


def test_estimates_have_the_stated_moments():
    truth, variances = np.array([1.0, -2.0]), np.array([4.0, 0.25])
    drawn = simulations.draw_estimates(truth, variances, 200_000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean(0), truth, atol=0.02)
    np.testing.assert_allclose(drawn.var(0), variances, rtol=0.02)


def test_lower_bound_tables_agree_with_the_bounds():
    table = simulations.lower_bound_probabilities([1, 4], [0.5, 2.0], [0, 20], 4000, 0)
    assert len(table) == 8
    at_zero, strong = table[table["signal"] == 0], table[table["signal"] == 20]
    assert (at_zero["low"] <= at_zero["sharp_lower"]).all()
    assert (at_zero["sharp_lower"] <= at_zero["high"]).all()
    assert (strong["low"] <= strong["sharp_upper"]).all()
    random = simulations.lower_bound_instances(20, 2000, 0)
    assert (random["low"] <= random["sharp_upper"]).all()
    assert (random["sharp_lower"] <= random["high"]).all()


def test_risk_formula_scores_look_standard_normal():
    z = simulations.risk_formulas(15, 5000, 3)["z"]
    assert len(z) == 60 and z.abs().max() < 4.5 and 0.5 < z.std() < 1.5


def test_simplex_search_finds_violations_only_at_the_boundary():
    search = simulations.simplex_search(3, 60, 3000, 1)
    assert 0 < search["interior"].sum() < len(search)
    assert not (search.loc[search["interior"], "z"] > 5).any()
    assert (search.loc[~search["interior"], "z"] > 5).any()


def test_noise_levels_compare_at_equal_step():
    paired = simulations.equal_step(4, 30, 0.1, [0.01, 3.0], 50, 0)
    assert len(paired) == 60
    exact = paired[paired["level"] == 0.01]
    # without noise Equation (2)'s step is the best of its length; it is matched over the problems
    assert exact["gain_difference"].mean() > 0.02
    np.testing.assert_allclose(exact["vanilla gain"] - exact["variance-aware gain"], exact["gain_difference"])


def test_steps_are_equal_as_solved_for():
    rng = np.random.default_rng(0)
    estimates, shape, reference = (rng.normal(size=(40, 6, 4)), rng.lognormal(size=(6, 4)), np.ones(4) / 4)
    radius = simulations.radius_of_step(0.05, estimates, reference, shape)
    policy = tabular.trust_region_policy(estimates, reference, radius, variances=shape)
    assert ((policy - reference) ** 2).sum(-1).mean() == pytest.approx(0.05, rel=1e-4)


def test_noise_levels_go_from_a_small_step_to_greedy():
    levels = simulations.noise_levels(4, 20, [0.001, 5.0], [0.5], 30, 0)
    steps = levels.groupby(["policy", "epsilon"])["step"].first()
    assert steps["vanilla"][0.001] == pytest.approx(0.001, rel=1e-6)
    assert (steps.xs(5.0, level="epsilon") > 0.5).all()


def test_crossing_level_covers_the_crossing():
    rng = np.random.default_rng(1)
    levels = np.repeat([0.5, 1.0, 2.0], 300)
    paired = pd.DataFrame(
        {
            "level": levels,
            "instance": np.tile(np.arange(300), 3),
            "gain_difference": 1 - levels / 1.3 + 0.5 * rng.normal(size=900),
        }
    )
    crossing = simulations.crossing_level(paired, seed=0)
    assert crossing.low < 1.3 < crossing.high and crossing.high - crossing.low < 0.4


def test_zero_crossing():
    levels = np.array([1.0, 2.0, 4.0])
    falling, never, again = np.array([[1.0, -1.0, -2.0], [1.0, 0.5, 0.1], [-1.0, 2.0, -2.0]])
    assert simulations.zero_crossing(levels, falling) == pytest.approx(1.5)
    assert np.isnan(simulations.zero_crossing(levels, never))
    together = simulations.zero_crossing(levels, np.stack([falling, never, again], axis=1))
    np.testing.assert_allclose(together, [1.5, np.nan, 3.0])


def test_printed_path_never_beats_the_optimum():
    gap = simulations.printed_policy_gap(15, [-5, 0, 5], 0.2, 0)
    assert gap["share_lost"].between(-1e-6, 1 + 1e-9).all() and gap["share_lost"].max() > 0.5
    assert gap.groupby("instance")["optimal_gain"].nunique().eq(1).all()


def test_best_on_printed_path_is_feasible_and_best():
    estimates, variances, reference = (np.array([1.0, 1.5, 1.95]), np.array([9, 0.25, 0.25]), np.ones(3) / 3)
    best = simulations.best_on_printed_path(estimates, variances, reference, 0.1)
    assert tabular.weighted_kl(best, reference, variances) <= 0.1
    for beta in np.geomspace(0.01, 100, 300):
        rival = tabular.printed_policy(estimates, variances, reference, beta)
        if tabular.weighted_kl(rival, reference, variances) <= 0.1 - 1e-6:
            assert rival @ estimates <= best @ estimates + 1e-3


def test_solvers_agree_on_theorem_27():
    rng = np.random.default_rng(4)
    for _ in range(5):
        estimates, variances, reference = rng.normal(size=4), rng.lognormal(size=4), np.ones(4) / 4
        ours, _ = tabular.constrained_policy(estimates[None, None], variances, reference, 0.1)
        theirs = simulations.optimum_by_slsqp(estimates, variances, reference, 0.1)
        assert ours[0, 0] @ estimates == pytest.approx(theirs @ estimates, abs=1e-6)
        policy = simulations.at_constraint(tabular.ppo_fixed_point, estimates, variances, reference, 0.1)
        assert tabular.weighted_kl(policy, reference, variances) == pytest.approx(0.1, abs=1e-8)
        assert policy @ estimates <= ours[0, 0] @ estimates + 1e-9


def test_trust_region_gains_are_those_of_the_closed_forms():
    truth, variances = np.array([0.5, 1.5, -1.0]), np.array([1.0, 4.0, 0.3])
    gains = simulations.trust_region_gains(truth, variances, 50_000, np.random.default_rng(0), "free")
    noise = simulations.draw_estimates(truth, variances, 50_000, np.random.default_rng(0))
    np.testing.assert_allclose(gains[0], noise @ truth / np.linalg.norm(noise, axis=1), atol=1e-12)
    assert (gains[1] <= 0).mean() == pytest.approx(bounds.variance_aware_risk(truth, variances), abs=0.01)


def test_variance_ratios_are_invariant_to_a_common_scale():
    rng = lambda: np.random.default_rng(9)  # noqa: E731
    truth, variances = np.array([0.5, 1.5, -1.0, 0.2]), np.array([3.0, 40.0, 9.0, 80.0])
    ratios = []
    for scale in (1.0, 0.1):
        vanilla, aware = simulations.trust_region_gains(
            scale * truth, scale**2 * variances, 20_000, rng(), "sum_to_one"
        )
        ratios.append(vanilla.var() / aware.var())
    assert ratios[0] == pytest.approx(ratios[1])
    table = simulations.variance_ratios([4], [1.0], [[3, 100], [5, 5.0001]], 4, 3000, 0)
    equal = table[table["range"] != "(3, 100)"]
    np.testing.assert_allclose(equal["ratio"], 1, atol=1e-3)  # equal variances: the same policy


def test_matched_kl_is_matched_and_relative_to_vanilla():
    table = simulations.matched_kl(5, 20, [0.5, 2.0], 0.4, 0.5, 150, 0)
    kl = table.groupby(["level", "policy"])["kl"].mean()
    np.testing.assert_allclose(kl, 0.4, rtol=1e-3)
    relative = simulations.relative_to_vanilla(table)
    assert "vanilla" not in set(relative["policy"])
    one = relative.iloc[0]
    pair = table[(table["level"] == one["level"]) & (table["instance"] == one["instance"])]
    pair = pair.set_index("policy")
    assert one["gain"] == pytest.approx(pair.loc[one["policy"], "gain"] - pair.loc["vanilla", "gain"])
    summary = simulations.summarize(relative, ["level", "policy"], ["gain"])
    assert (summary["gain_low"] <= summary["gain_high"]).all()


def test_tables_depend_on_nothing_but_their_arguments():
    first, again, other = (simulations.risk_formulas(3, 500, seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_the_counterexamples_losses_are_those_of_quadrature():
    """r* = (1, 0), variances (1, K): vanilla's gain is x / hypot(x, sqrt(K) z), the other's has K = 1."""
    table = simulations.tail_counterexample([25.0], 0.1, 400_000, seed=0).set_index("policy")
    for name, spread in (("vanilla", 5.0), ("variance-aware", 1.0)):

        def loss(z, x, spread=spread):
            return -x / np.hypot(x, spread * z) * norm.pdf(x - 1) * norm.pdf(z)

        expected = dblquad(loss, -6, 0, -6, 6, epsabs=1e-6)[0]
        assert table.loc[name, "loss"] == pytest.approx(expected, rel=0.02)
        assert table.loc[name, "risk"] == pytest.approx(norm.cdf(-1), abs=0.003)
    assert table.loc["vanilla", "cvar"] > table.loc["variance-aware", "cvar"] + 0.1
    assert (table["worst_loss"] <= 1 + 1e-9).all()


def test_tails_extend_the_theorem_at_equal_gain_and_only_the_worst_loss_at_its_radii():
    table = simulations.tail_search(40, 0.1, 20_000, seed=1)
    equal, radii = (table[table["steps"] == name] for name in ("equal gain", "radii"))
    assert len(equal) == len(radii) == 40
    for column in ("cvar", "loss"):
        assert equal[f"{column}_z"].min() > -4 and equal[column].max() > 0.05
        assert radii[f"{column}_z"].min() < -5
