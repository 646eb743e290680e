"""The tabular policies against general solvers, Monte Carlo and their own optimality."""

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize

from vaalign_lib.theory import tabular
from vaalign_lib.theory.tabular import (
    constrained_policy,
    exact_policy,
    expected_reward,
    grpo_fixed_point,
    matched_epsilon,
    mean_minus_variance_policy,
    ppo_fixed_point,
    printed_policy,
    softmax_policy,
    trust_region_policy,
    weighted_kl,
)

FORMS = ("free", "sum_to_one", "simplex")
KL_POLICIES = {
    "printed": printed_policy,
    "exact": exact_policy,
    "ppo": ppo_fixed_point,
    "grpo": grpo_fixed_point,
}
SHIFT_INVARIANT = ("exact", "ppo", "grpo")


def instance(seed: int, arms: int | None = None):
    """Random estimates, variances and reference of 2 to 7 arms."""
    rng = np.random.default_rng(seed)
    arms = arms or int(rng.integers(2, 8))
    return (rng.normal(0, 2, arms), rng.lognormal(0, 1, arms), rng.dirichlet(np.ones(arms)))


@st.composite
def problems(draw):
    """Problems for hypothesis: moderate rewards, variances over two decades, any reference."""
    arms = draw(st.integers(2, 6))

    def floats(low, high):
        return arrays(float, arms, elements=st.floats(low, high, allow_subnormal=False))

    reference = draw(floats(0.01, 1.0))
    return draw(floats(-5, 5)), draw(floats(0.125, 8.0)), reference / reference.sum()


# --- Equations (2) and (3) ------------------------------------------------------------------------


def solve_by_cvxpy(estimates, variances, reference, epsilon, form):
    policy = cvxpy.Variable(len(estimates))
    scaled = cvxpy.multiply(np.sqrt(variances), policy - reference)
    constraints = [cvxpy.norm(scaled) <= np.sqrt(epsilon)]
    constraints += [cvxpy.sum(policy) == 1] if form != "free" else []
    constraints += [policy >= 0] if form == "simplex" else []
    cvxpy.Problem(cvxpy.Maximize(estimates @ policy), constraints).solve(solver="CLARABEL")
    return policy.value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(12))
def test_trust_region_policy_matches_a_general_solver(form, seed):
    estimates, variances, reference = instance(seed)
    epsilon = 10 ** np.random.default_rng(seed).uniform(-3, 0.5)
    ours = trust_region_policy(estimates, reference, epsilon, variances=variances, form=form)
    theirs = solve_by_cvxpy(estimates, variances, reference, epsilon, form)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert estimates @ ours >= estimates @ theirs - 1e-7


def test_simplex_policy_is_optimal_and_feasible_on_many_draws():
    """No feasible point of a random search beats it, and the KKT multipliers have the right signs."""
    rng = np.random.default_rng(1)
    draws, arms = 10_000, 10
    estimates = rng.normal(size=(draws, arms))
    variances = rng.lognormal(0, 1, (draws, arms))
    reference = rng.dirichlet(np.ones(arms), draws)
    epsilon = 10 ** rng.uniform(-4, 1, draws)
    policy = trust_region_policy(estimates, reference, epsilon, variances=variances)
    assert policy.min() >= 0
    np.testing.assert_allclose(policy.sum(-1), 1, atol=1e-12)
    used = (variances * (policy - reference) ** 2).sum(-1)
    assert (used <= epsilon * (1 + 1e-9)).all()
    binding = used > epsilon * (1 - 1e-9)
    greedy = policy.max(-1) > 1 - 1e-12
    assert (binding | greedy).all() and binding.any() and greedy.any()
    # stationarity: R - 2 mu sigma^2 (pi - pi0) - nu is 0 on the support and <= 0 off it
    penalty = variances * (policy - reference)
    support = policy > 0
    rows = binding & (support.sum(-1) >= 2)
    for i in np.flatnonzero(rows)[:500]:
        inside = support[i]
        design = np.stack([2 * penalty[i, inside], np.ones(inside.sum())], axis=1)
        (mu, nu), *_ = np.linalg.lstsq(design, estimates[i, inside], rcond=None)
        residual = estimates[i] - 2 * mu * penalty[i] - nu
        assert mu >= -1e-9
        assert np.abs(residual[inside]).max() < 1e-6
        assert residual[~inside].max(initial=-1) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_constant_estimates_leave_sum_constrained_policies_at_the_reference(form):
    reference = np.array([0.2, 0.3, 0.5])
    policy = trust_region_policy(np.full(3, 0.1), reference, 0.5, variances=[1, 2, 3], form=form)
    if form == "free":
        assert (policy > reference).all()
    else:
        np.testing.assert_array_equal(policy, reference)


def test_reference_with_zeros_is_solved_on_the_simplex():
    estimates, variances = (np.array([1.0, 0.0, -1.0, 2.0]), np.array([1.0, 1.0, 1.0, 5.0]))
    for reference in ([1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1.0, 0]):
        ours = trust_region_policy(estimates, reference, 0.05, variances=variances)
        theirs = solve_by_cvxpy(estimates, variances, np.array(reference), 0.05, "simplex")
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@given(problems(), st.floats(1e-3, 2.0), st.sampled_from(FORMS), st.floats(-20, 20))
@settings(max_examples=150, deadline=None)
def test_trust_region_properties(problem, epsilon, form, shift):
    estimates, variances, reference = problem
    policy = trust_region_policy(estimates, reference, epsilon, variances=variances, form=form)
    used = (variances * (policy - reference) ** 2).sum()
    assert used <= epsilon * (1 + 1e-9)
    if form == "simplex":
        assert policy.min() >= 0
    if form != "free":
        assert policy.sum() == pytest.approx(1, abs=1e-9)
        if np.ptp(estimates) > 1e-3:
            shifted = trust_region_policy(
                estimates + shift, reference, epsilon, variances=variances, form=form
            )
            np.testing.assert_allclose(shifted, policy, atol=1e-7)
    if form != "simplex" and np.ptp(estimates) > 1e-3:
        assert used == pytest.approx(epsilon, rel=1e-9)


def test_adding_a_constant_changes_the_free_and_the_printed_policy():
    estimates, variances, reference = (np.array([3, 1.6, 1.9]), np.array([9, 0.25, 0.25]), np.ones(3) / 3)
    for shift in (-3.0, 10.0):
        free = [
            trust_region_policy(estimates + c, reference, 0.1, variances=variances, form="free")
            for c in (0, shift)
        ]
        assert np.abs(free[0] - free[1]).max() > 0.01
        printed = [printed_policy(estimates + c, variances, reference, 1.0) for c in (0, shift)]
        assert np.abs(printed[0] - printed[1]).max() > 1e-4
    # at a shift of -10 the printed form prefers the arm it gave 5 in 10,000 before
    assert printed_policy(estimates - 10, variances, reference, 1.0)[0] > 0.999
    assert printed_policy(estimates, variances, reference, 1.0)[0] < 0.001


def test_matched_epsilon_is_the_smallest_variance_times_epsilon():
    variances = np.array([[4.0, 0.5, 2.0], [1.0, 3.0, 9.0]])
    np.testing.assert_array_equal(matched_epsilon(variances, [2.0, 3.0]), [1.0, 3.0])


# --- Theorem 2.7 and its relatives ----------------------------------------------------------------


def bregman(policy, reference, weights):
    """Penalty whose optimum the PPO fixed point is: beta sum sigma^2 (pi ln(pi/pi0) - pi + pi0)."""
    return (weights * (policy * np.log(policy / reference) - policy + reference)).sum()


def forward_bregman(policy, reference, weights):
    """Penalty of the k3 fixed point: beta sum sigma^2 (pi0 ln(pi0/pi) - pi0 + pi)."""
    return (weights * (reference * np.log(reference / policy) - reference + policy)).sum()


def lagrangian(policy, reference, weights):
    return (weights * policy * np.log(policy / reference)).sum()


@pytest.mark.parametrize(
    ("policy_of", "penalty"),
    [(exact_policy, lagrangian), (ppo_fixed_point, bregman), (grpo_fixed_point, forward_bregman)],
    ids=["exact", "ppo", "grpo"],
)
@pytest.mark.parametrize("seed", range(8))
def test_policies_maximize_their_objectives(policy_of, penalty, seed):
    """scipy, started elsewhere, finds no better policy and the same one."""
    estimates, variances, reference = instance(seed, arms=4)
    beta = 10 ** np.random.default_rng(seed).uniform(-0.1, 0.7)
    ours = policy_of(estimates, variances, reference, beta)

    def loss(logits):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        return penalty(policy, reference, beta * variances) - estimates @ policy

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    theirs = np.exp(best.x - best.x.max())
    assert loss(np.log(ours)) <= best.fun + 1e-9
    np.testing.assert_allclose(ours, theirs / theirs.sum(), atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_softmax_and_printed_policy_maximize_what_their_docstrings_say(seed):
    estimates, variances, reference = instance(seed, arms=5)
    rivals = np.random.default_rng(seed).dirichlet(np.ones(5), 20_000)

    def value(policy, rewards, beta):
        return (policy * rewards).sum(-1) - beta * weighted_kl(policy, reference)

    ours = softmax_policy(estimates, reference, 0.7)
    assert value(ours, estimates, 0.7) >= value(rivals, estimates, 0.7).max()
    scaled = estimates / (0.7 * variances)
    ours = printed_policy(estimates, variances, reference, 0.7)
    assert value(ours, scaled, 1.0) >= value(rivals, scaled, 1.0).max()


@pytest.mark.parametrize("seed", range(4))
def test_exact_gradient_ascent_reaches_the_fixed_points(seed):
    """Stochastic-gradient view: the expected updates of PPO and GRPO vanish at their fixed points.

    The expectation over y ~ pi is taken in closed form, the penalty once as a detached reward and
    once through the k3 estimator in the loss, with the gradient by central differences.
    """
    estimates, variances, reference = instance(seed, arms=4)
    beta = 0.8

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum())

    def score(logits):  # d log pi(y) / d logits, (y, logits)
        return np.eye(4) - np.exp(log_softmax(logits))

    ppo = np.log(ppo_fixed_point(estimates, variances, reference, beta))
    reward = estimates - beta * variances * (ppo - np.log(reference))
    assert np.abs((np.exp(ppo) * reward) @ score(ppo)).max() < 1e-10

    grpo = np.log(grpo_fixed_point(estimates, variances, reference, beta))
    behaviour = np.exp(grpo)  # samples come from here and are held fixed

    def loss_penalty(logits):
        gap = np.log(reference) - log_softmax(logits)
        return behaviour @ (beta * variances * (np.exp(gap) - 1 - gap))

    steps = 1e-5 * np.eye(4)
    gradient = [(loss_penalty(grpo + h) - loss_penalty(grpo - h)) / 2e-5 for h in steps]
    assert np.abs((behaviour * estimates) @ score(grpo) - gradient).max() < 1e-7


@given(problems(), st.floats(0.1, 5.0), st.floats(-20, 20), st.sampled_from(sorted(KL_POLICIES)))
@settings(max_examples=200, deadline=None)
def test_kl_policy_properties(problem, beta, shift, name):
    estimates, variances, reference = problem
    policy_of = KL_POLICIES[name]
    policy = policy_of(estimates, variances, reference, beta)
    assert policy.min() >= 0
    assert policy.sum() == pytest.approx(1, abs=1e-12)
    if name in SHIFT_INVARIANT:
        shifted = policy_of(estimates + shift, variances, reference, beta)
        np.testing.assert_allclose(shifted, policy, atol=1e-9)


@given(problems(), st.floats(0.1, 5.0), st.floats(0.2, 5.0))
@settings(max_examples=100, deadline=None)
def test_equal_variances_make_all_forms_vanilla_up_to_beta(problem, beta, variance):
    estimates, _, reference = problem
    vanilla = softmax_policy(estimates, reference, beta * variance)
    equal = np.full_like(estimates, variance)
    for name in ("printed", "exact", "ppo"):
        np.testing.assert_allclose(KL_POLICIES[name](estimates, equal, reference, beta), vanilla, atol=1e-9)
    pessimist = mean_minus_variance_policy(estimates, equal, reference, beta * variance, 3.0)
    np.testing.assert_allclose(pessimist, vanilla, atol=1e-9)
    for form in ("sum_to_one", "simplex"):
        np.testing.assert_allclose(
            trust_region_policy(estimates, reference, variance * 0.1, variances=equal, form=form),
            trust_region_policy(estimates, reference, 0.1, form=form),
            atol=1e-9,
        )


def test_grpo_with_equal_variances_is_the_forward_kl_policy():
    estimates, _, reference = instance(3, arms=5)
    policy = grpo_fixed_point(estimates, 2.0, reference, 0.5)
    level = estimates - (1 - reference / policy)  # beta sigma^2 = 1
    assert np.ptp(level) < 1e-12


def test_extreme_weights_are_solved():
    """Variances over twelve decades and a beta from greedy to nearly none."""
    rng = np.random.default_rng(5)
    estimates = rng.normal(size=(500, 6))
    variances = 10 ** rng.uniform(-6, 6, (500, 6))
    reference = rng.dirichlet(np.ones(6), 500)
    for beta in (1e-6, 1e-2, 1.0, 1e4):
        exact = exact_policy(estimates, variances, reference, beta)
        ppo = ppo_fixed_point(estimates, variances, reference, beta)
        grpo = grpo_fixed_point(estimates, variances, reference, beta)
        for policy in (exact, ppo, grpo):
            assert np.isfinite(policy).all()
            np.testing.assert_allclose(policy.sum(-1), 1, atol=1e-9)
        for policy, offset in ((exact, 1.0), (ppo, 0.0)):  # one multiplier serves all arms
            weights = beta * variances
            has_mass = policy > 1e-200
            log_ratio = np.log(np.where(has_mass, policy, 1.0) / reference)
            nu = np.where(has_mass, estimates - weights * (log_ratio + offset), np.nan)
            surest = np.take_along_axis(nu, np.where(has_mass, weights, np.inf).argmin(-1)[:, None], -1)
            gap = np.where(has_mass, np.abs(nu - surest) / (1 + weights), 0.0)
            assert gap.max() < 1e-9


def test_policies_give_no_mass_to_arms_outside_the_reference():
    estimates, variances, reference = (np.array([5.0, 1, 2]), np.array([1.0, 2, 3]), np.array([0, 0.4, 0.6]))
    for policy_of in KL_POLICIES.values():
        assert policy_of(estimates, variances, reference, 0.5)[0] == 0


def test_batched_results_equal_single_ones():
    rng = np.random.default_rng(8)
    estimates = rng.normal(size=(3, 4, 5))
    variances, reference = rng.lognormal(size=(4, 5)), rng.dirichlet(np.ones(5), 4)
    beta = rng.uniform(0.2, 2, (3, 1))
    for policy_of in KL_POLICIES.values():
        together = policy_of(estimates, variances, reference, np.broadcast_to(beta, (3, 4)))
        alone = policy_of(estimates[2, 1], variances[1], reference[1], beta[2, 0])
        np.testing.assert_allclose(together[2, 1], alone, atol=1e-12)
    together = trust_region_policy(estimates, reference, beta, variances=variances)
    alone = trust_region_policy(estimates[2, 1], reference[1], beta[2, 0], variances=variances[1])
    np.testing.assert_allclose(together[2, 1], alone, atol=1e-12)


# --- Theorem 2.7's constrained problem ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_constrained_policy_matches_a_general_solver(seed):
    """Two prompts with one constraint: scipy's SLSQP finds the same value."""
    rng = np.random.default_rng(seed)
    estimates, variances = rng.normal(size=(1, 2, 3)), rng.lognormal(0, 0.7, (1, 2, 3))
    reference, weights = rng.dirichlet(np.full(3, 5.0), 2)[None], np.array([0.3, 0.7])
    epsilon = 0.15
    policy, beta = constrained_policy(estimates, variances, reference, epsilon, weights)
    assert beta[0] > 0
    assert weighted_kl(policy, reference, variances, weights)[0] == pytest.approx(epsilon, abs=1e-9)

    def unpack(flat):
        return flat.reshape(1, 2, 3)

    constraints = [
        {"type": "eq", "fun": lambda z: unpack(z).sum(-1)[0] - 1},
        {
            "type": "ineq",
            "fun": lambda z: (
                epsilon - (variances * unpack(z) * np.log(unpack(z) / reference)).sum(-1)[0] @ weights
            ),
        },
    ]
    best = max(
        (
            minimize(
                lambda z: -(unpack(z) * estimates).sum(-1)[0] @ weights,
                rng.dirichlet(np.full(3, 5.0), 2).ravel(),
                bounds=[(1e-9, 1)] * 6,
                constraints=constraints,
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-13},
            )
            for _ in range(3)
        ),
        key=lambda result: -result.fun if result.success else -np.inf,
    )
    ours = (weights * expected_reward(policy, estimates)).sum()
    assert ours == pytest.approx(-best.fun, abs=1e-6)


def test_constrained_policy_is_greedy_where_the_constraint_is_loose():
    estimates = np.array([[[1.0, 3.0, 2.0]], [[1.0, 3.0, 3.0]]])
    policy, beta = constrained_policy(estimates, np.array([1.0, 2.0, 0.5]), np.ones(3) / 3, 50.0)
    np.testing.assert_array_equal(beta, 0)
    np.testing.assert_allclose(policy[0, 0], [0, 1, 0])
    # between equal arms the smaller weighted divergence decides
    tied = np.stack([np.zeros(999), p := np.linspace(0.001, 0.999, 999), 1 - p], axis=-1)
    values = weighted_kl(tied, np.ones(3) / 3, np.array([1.0, 2.0, 0.5]))
    assert policy[1, 0, 1] == pytest.approx(tied[values.argmin(), 1], abs=2e-3)


def test_weighted_kl_can_be_negative_and_is_kl_for_unit_variances():
    reference = np.ones(3) / 3
    variances = np.array([9, 0.25, 0.25])
    policy = exact_policy(np.zeros(3), variances, reference, 1.0)
    rivals = np.random.default_rng(0).dirichlet(np.ones(3), 100_000)
    lowest = weighted_kl(rivals, reference, variances).min()
    assert weighted_kl(policy, reference, variances) == pytest.approx(lowest, abs=1e-3)
    assert weighted_kl(policy, reference, variances) < -1
    assert weighted_kl(rivals, reference).min() >= 0
    assert weighted_kl([0.5, 0.5, 0], reference) == pytest.approx(np.log(1.5))
    assert weighted_kl([0.5, 0.5, 0], [1.0, 0, 0]) == np.inf


# --- strengths ----------------------------------------------------------------------------------------


def test_strengths_broadcast_against_the_problem():
    estimates, variances, reference = instance(4, arms=3)
    strengths = np.array([0.3, 1.0, 2.5])
    for policy_of in (*KL_POLICIES.values(),):
        many = policy_of(estimates, variances, reference, strengths)
        assert many.shape == (3, 3)
        np.testing.assert_allclose(many[1], policy_of(estimates, variances, reference, 1.0), atol=1e-12)
    for form in FORMS:
        many = trust_region_policy(estimates, reference, strengths, variances=variances, form=form)
        alone = trust_region_policy(estimates, reference, 2.5, variances=variances, form=form)
        np.testing.assert_allclose(many[2], alone, atol=1e-12)
    many = mean_minus_variance_policy(estimates, variances, reference, 0.7, strengths)
    assert many.shape == (3, 3)


BAD = {
    "estimates": ([np.nan, 1.0], [1j, 1.0], [1.0, 2.0, 3.0], [1.0], 1.0),
    "variances": ([0.0, 1.0], [np.inf, 1.0], [1j, 1.0], [1.0, 2.0, 3.0]),
    "reference": ([0.5, 0.6], [-0.1, 1.1], [np.nan, 1.0], [1.0], np.full(2, 0.5 + 0j)),
    "beta": (0.0, -1.0, np.nan, np.inf, 1j, np.ones((1, 1, 1))),
}


@pytest.mark.parametrize("policy_of", [*KL_POLICIES.values(), mean_minus_variance_policy])
def test_every_policy_refuses_by_name(policy_of):
    good = {"estimates": [[1.0, 2.0]], "variances": [1.0, 2.0], "reference": [0.5, 0.5], "beta": 1.0}
    more = {"aversion": 1.0} if policy_of is mean_minus_variance_policy else {}
    assert policy_of(**good, **more).shape == (1, 2)
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                policy_of(**good | {name: value}, **more)


LIMIT = {
    "estimates": np.array([1.0, 2.0, 2.0, -1.0, 9e9]),
    "variances": np.array([1.0, 2.0, 3.0, 0.5, 1.0]),
    "reference": np.array([0.1, 0.2, 0.3, 0.4, 0.0]),
}


def greedy(name):
    """The limit beta -> 0 between the tied arms 2 and 3 by hand, the share of arm 2.

    Printed: the largest R / sigma^2 are those of arms 1 and 2. Else nu makes the two sum to one:
    pi = pi_0 exp(-nu / sigma^2 - offset) or, for GRPO, pi_0 sigma^2 / (nu + sigma^2).
    """
    first, other, s, t = 0.2, 0.3, 2.0, 3.0
    share = {
        "softmax": lambda nu: first / (first + other),
        "exact": lambda nu: first * np.exp(-nu / s - 1),
        "ppo": lambda nu: first * np.exp(-nu / s),
        "grpo": lambda nu: first * s / (nu + s),
    }[name]
    rest = {
        "softmax": lambda nu: other / (first + other),
        "exact": lambda nu: other * np.exp(-nu / t - 1),
        "ppo": lambda nu: other * np.exp(-nu / t),
        "grpo": lambda nu: other * t / (nu + t),
    }[name]
    if name == "softmax":
        return share(0)
    low = -1.99 if name == "grpo" else -50
    return share(brentq(lambda nu: share(nu) + rest(nu) - 1, low, 50, xtol=1e-14))


@pytest.mark.parametrize("beta", [1e-310, 1e-100, 1e-30, 1e-14])
@pytest.mark.parametrize("size", [1.0, 1e100])
def test_without_penalty_policies_are_greedy_on_the_reference(beta, size):
    arguments = LIMIT | {"estimates": size * LIMIT["estimates"]}
    vanilla = softmax_policy(arguments["estimates"], arguments["reference"], beta)
    np.testing.assert_allclose(vanilla, [0, 0.4, 0.6, 0, 0], atol=1e-9)
    printed = printed_policy(**arguments, beta=beta)
    np.testing.assert_allclose(printed, [1 / 3, 2 / 3, 0, 0, 0], atol=1e-9)
    for name in ("exact", "ppo", "grpo"):
        policy = KL_POLICIES[name](**arguments, beta=beta)
        share = greedy(name)
        np.testing.assert_allclose(policy, [0, share, 1 - share, 0, 0], atol=1e-9)


@pytest.mark.parametrize("beta", [1e14, 1e100, 1e300])
def test_under_any_larger_penalty_policies_stay_where_the_penalty_is_least(beta):
    reference, variances = LIMIT["reference"], LIMIT["variances"]
    for name, policy_of in KL_POLICIES.items():
        expected = reference
        if name == "exact":  # the least of E[sigma^2 ln(pi / pi_0)] is not at pi_0
            expected = exact_policy(np.zeros(5), variances, reference, 1.0)
        policy = policy_of(**LIMIT | {"estimates": LIMIT["estimates"] * (reference > 0)}, beta=beta)
        np.testing.assert_allclose(policy, expected, atol=1e-9)


def test_a_single_arm_has_all_the_mass():
    for policy_of in KL_POLICIES.values():
        assert policy_of([3.0], [2.0], [1.0], 0.1) == [1.0]
    for form in ("sum_to_one", "simplex"):
        assert trust_region_policy([3.0], [1.0], 0.5, variances=[2.0], form=form) == [1.0]
    policy, beta = constrained_policy([[[3.0]]], 1.0, [1.0], 0.1)
    assert policy == 1 and beta == 0


def test_a_divergence_of_zero_leaves_the_reference():
    reference = np.array([0.2, 0.3, 0.5])
    policy, beta = constrained_policy([[[1.0, 2, 3]]] * 2, 1.0, reference, [0.0, 0.1])
    np.testing.assert_allclose(policy[0, 0], reference, atol=1e-7)
    assert weighted_kl(policy[1, 0], reference) == pytest.approx(0.1) and beta[0] > 1e7 > beta[1]


def test_constraints_down_to_the_smallest_value():
    """E[sigma^2 ln(pi/pi0)] has a smallest value below zero."""
    estimates, variances = (np.array([[[3, 1.6, 1.9]]]), np.array([9, 0.25, 0.25]))
    policy, _ = constrained_policy(estimates, variances, np.ones(3) / 3, -1.0)
    assert weighted_kl(policy, 1 / 3, variances) == pytest.approx(-1.0)


def test_newton_never_runs_to_its_limit(monkeypatch):
    """Thirty steps are enough everywhere; the limit of two hundred is a guard, not a setting."""
    rng = np.random.default_rng(2)
    problem = (
        rng.normal(size=(2000, 5)),
        10 ** rng.uniform(-3, 3, (2000, 5)),
        rng.dirichlet(np.ones(5), 2000),
    )
    expected = [policy_of(*problem, 0.3) for policy_of in (exact_policy, grpo_fixed_point)]
    monkeypatch.setattr(tabular, "_NEWTON_STEPS", 30)
    for policy_of, before in zip((exact_policy, grpo_fixed_point), expected, strict=True):
        np.testing.assert_array_equal(policy_of(*problem, 0.3), before)
