"""Policies on stored responses: gradients, fixed points, equal KL, policies that do not see each other."""

import numpy as np
import pytest

from vaalign_lib.theory import feature_bench, tabular
from vaalign_lib.theory.feature_bench import Bench, Objective, at_beta, at_kl, path

P, S, D, N = 5, 12, 3, 4
BETA = 0.7


def problem(prompts=P, linear=True, seed=0):
    random = np.random.default_rng(seed)
    features = random.standard_normal((prompts, S, D)) if linear else None
    gold, style = random.standard_normal((2, prompts, S))
    variance = np.exp(0.5 * random.standard_normal((prompts, S)))
    errors = np.sqrt(variance) * random.standard_normal((N, prompts, S))
    return Bench(features, gold, gold + 0.3 * style, variance, errors)


def log_policies(bench, theta):
    logits = np.einsum("psd,nd->nps", bench.features, theta)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def stated(bench, theta, weights, beta):
    """E_pi[r] - beta E_pi[w ln(pi / pi_0)] (N,), written anew."""
    log_policy = log_policies(bench, theta)
    rewards = bench.consensus + bench.errors
    return (np.exp(log_policy) * (rewards - beta * weights * (log_policy + np.log(S)))).sum(-1).mean(-1)


def programmed(bench, theta, held, weights, beta):
    """E_pi[r - beta w ln(pi_held / pi_0)] (N,): what a policy gradient sees of a penalty held constant."""
    ratio = log_policies(bench, held) + np.log(S)
    rewards = bench.consensus + bench.errors - beta * weights * ratio
    return (np.exp(log_policies(bench, theta)) * rewards).sum(-1).mean(-1)


def differences(of, theta, step=1e-5):
    """Return central differences (N, ..., D) of a function of theta (N, D)."""
    moved = [step * np.eye(D)[k] for k in range(D)]
    return np.stack([(of(theta + one) - of(theta - one)) / (2 * step) for one in moved], axis=-1)


@pytest.mark.parametrize("exact", [False, True])
def test_gradient_and_curvature_are_those_of_finite_differences(exact):
    bench, theta = problem(), 0.5 * np.random.default_rng(1).standard_normal((N, D))
    inside = feature_bench._problem(bench, Objective(bench.variance, stated=exact))
    strength = np.full(N, 1 / BETA)

    def gradient(at):
        found = inside.moments(at, strength)
        return strength[:, None] * found.reward_gradient - found.penalty_gradient

    if exact:
        expected = differences(lambda at: stated(bench, at, bench.variance, BETA), theta)
    else:
        expected = differences(lambda at: programmed(bench, at, theta, bench.variance, BETA), theta)
    found = inside.moments(theta, strength)
    np.testing.assert_allclose(BETA * gradient(theta), expected, atol=1e-8)
    np.testing.assert_allclose(-found.curvature, differences(gradient, theta), atol=1e-7)
    value = differences(lambda at: inside.moments(at, strength).value(strength), theta)
    np.testing.assert_allclose(value, gradient(theta), atol=1e-8)
    kl = differences(lambda at: inside.moments(at, strength).kl, theta)
    np.testing.assert_allclose(found.kl_gradient, kl, atol=1e-8)


@pytest.mark.parametrize("form", ["one feature a response", "free"])
@pytest.mark.parametrize(
    ("exact", "closed"), [(False, tabular.ppo_fixed_point), (True, tabular.exact_policy)]
)
def test_with_a_logit_for_each_response_policies_are_the_closed_forms(exact, closed, form):
    bench = problem(prompts=1, linear=False)
    if form != "free":
        bench = Bench(np.eye(S)[None], bench.gold, bench.consensus, bench.variance, bench.errors)
    found = at_beta(bench, Objective(bench.variance, stated=exact), BETA)
    even = np.full(S, 1 / S)
    expected = closed(bench.consensus[0] + bench.errors[:, 0], bench.variance[0], even, np.full(N, BETA))
    gold = bench.gold[0] - bench.gold[0].mean()
    np.testing.assert_allclose(found.gains, expected @ gold, atol=1e-4)
    np.testing.assert_allclose(found.kl, tabular.weighted_kl(expected, even), atol=1e-4)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("target", [0.1, 0.3])
def test_the_mean_kl_is_the_target(linear, target):
    bench = problem(linear=linear)
    for weights in (1.0, bench.variance):
        found = at_kl(bench, Objective(weights), target)
        assert found.kl.mean() == pytest.approx(target, rel=0.01)
        again = at_beta(bench, Objective(weights), found.beta)
        np.testing.assert_allclose(again.gains, found.gains, atol=1e-3)
        near = at_kl(bench, Objective(weights), 1.1 * target, start=found)
        assert near.kl.mean() == pytest.approx(1.1 * target, rel=0.01) and near.beta[0] < found.beta[0]


@pytest.mark.parametrize("linear", [False, True])
def test_policies_trained_together_equal_each_alone(linear):
    bench = problem(linear=linear)
    objective, betas = Objective(bench.variance), np.array([0.5, 0.7, 1.0, 2.0])
    together = at_beta(bench, objective, betas)
    for k, beta in enumerate(betas):
        one = Bench(bench.features, bench.gold, bench.consensus, bench.variance, bench.errors[k : k + 1])
        alone = at_beta(one, objective, beta)
        np.testing.assert_allclose(alone.gains[0], together.gains[k], atol=1e-4)
        np.testing.assert_allclose(alone.kl[0], together.kl[k], atol=1e-4)


def test_kl_falls_along_the_path_and_the_outcome_is_as_named():
    bench = problem()
    table = path(bench, Objective(), [0.5, 2.0, 1.0])
    assert table["beta"].tolist() == pytest.approx([2.0, 1.0, 0.5]) and table["kl"].is_monotonic_increasing
    found = at_beta(bench, Objective(), 1.0)
    policies = np.exp(log_policies(bench, found.theta))
    gains = (policies * bench.gold).sum(-1).mean(-1) - bench.gold.mean()
    np.testing.assert_allclose(found.gains, gains, atol=1e-12)
    expected = [gains.mean(), gains.std(ddof=1), (gains < 0).mean(), gains.mean() ** 2 / gains.var(ddof=1)]
    np.testing.assert_allclose(
        table.iloc[1][["gain", "deviation", "risk", "signal"]].tolist(), expected, rtol=1e-3
    )
    other = at_beta(bench, Objective(bench.variance), 1.0)
    assert found.log_ratio(other) == pytest.approx(
        np.log((other.deviation / other.gain) ** 2 / (found.deviation / found.gain) ** 2)
    )


def test_a_reward_without_trust_makes_one_policy_of_all():
    found = at_kl(problem(), Objective(cost=1.0, trust=0.0), 0.2)
    assert np.ptp(found.gains) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": np.zeros((P, S + 1))}, r"gold: expected \(5, 12\)"),
        ({"variance": np.zeros((P, S))}, "variance: expected finite numbers above 0"),
        ({"features": np.zeros((P, S))}, "features: expected an array of 3 axes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = vars(problem())
    with pytest.raises(ValueError, match=message):
        Bench(**good | change)


def test_what_cannot_be_reached_is_said():
    bench = problem(linear=False)
    with pytest.raises(ValueError, match="weights: expected a number or an array of shape"):
        at_beta(bench, Objective(np.ones(S)), 1.0)
    with pytest.raises(ValueError, match="target: no coefficient was found at which the KL is 50 nats"):
        at_kl(bench, Objective(), 50)


@pytest.mark.parametrize("exact", [False, True])
def test_weights_of_their_own_are_those_of_each_alone(exact):
    bench = problem(linear=False)
    weights = np.exp(0.5 * np.random.default_rng(3).standard_normal(bench.errors.shape))
    together = at_beta(bench, Objective(weights, stated=exact), BETA)
    for k in range(N):
        one = Bench(None, bench.gold, bench.consensus, bench.variance, bench.errors[k : k + 1])
        alone = at_beta(one, Objective(weights[k], stated=exact), BETA)
        np.testing.assert_allclose(alone.gains[0], together.gains[k], atol=1e-6)
        np.testing.assert_allclose(alone.kl[0], together.kl[k], atol=1e-6)
    assert at_kl(bench, Objective(weights), 0.3).kl.mean() == pytest.approx(0.3, rel=0.01)
    with pytest.raises(ValueError, match="weights"):
        at_beta(bench, Objective(weights[:2]), BETA)
