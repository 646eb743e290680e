"""The toy of reward-robust RLHF: a stack is as many separate networks, and the two worst cases."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional

from vaalign_lib.theory import toy
from vaalign_lib.theory.robust import integrated, robust_value, worst_return_policy

SMALL = toy.Settings(hidden=6, reward_steps=12, policy_steps=12)


def test_pairs_have_two_different_wrong_responses():
    pairs = toy.draw_pairs(4000, np.random.default_rng(0))
    assert (pairs != np.arange(8)[:, None]).all() and (pairs[..., 0] != pairs[..., 1]).all()
    for prompt in range(8):  # the seven others are equally likely
        share = np.bincount(pairs[:, prompt].ravel(), minlength=8) / 8000
        assert share[prompt] == 0 and np.abs(np.delete(share, prompt) - 1 / 7).max() < 0.02


def separate(layers, k):
    """Return one network of a stack as torch's own modules."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        one = nn.Linear(weight.shape[1], weight.shape[2])
        one.weight.data, one.bias.data = weight[k].T.detach().clone(), bias[k, 0].detach().clone()
        one.bias.requires_grad_(bias.requires_grad)
        modules += [one, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def test_a_stack_of_reward_models_is_as_many_separate_ones():
    pairs = toy.draw_pairs(3, np.random.default_rng(1))
    rewards = toy.train_rewards(pairs, SMALL, seed=5)
    layers = toy.networks(3, [16, 6, 6, 1], 5)
    layers[-1][1].requires_grad_(False)
    for k in range(3):
        net = separate(layers, k)
        adam = torch.optim.Adam(net.parameters(), lr=SMALL.learning_rate, eps=toy.EPSILON)
        for _ in range(SMALL.reward_steps):
            loss = torch.zeros(())
            for prompt in range(8):
                for wrong in pairs[k, prompt]:
                    seen = [torch.cat([torch.eye(8)[prompt], torch.eye(8)[one]]) for one in (prompt, wrong)]
                    loss = loss - functional.logsigmoid(net(seen[0]) - net(seen[1])).sum() / 16
            adam.zero_grad()
            loss.backward()
            adam.step()
        own = np.array([[net(torch.cat([x, a])).item() for a in torch.eye(8)] for x in torch.eye(8)])
        np.testing.assert_allclose(rewards[k], own, atol=1e-4)


def test_a_stack_of_policies_is_as_many_separate_ones():
    rewards = np.random.default_rng(2).standard_normal((3, 8, 8))
    policies = toy.train_policies(toy.expected(rewards), 3, SMALL, seed=7)
    layers = toy.networks(3, [8, 6, 6, 8], 7)
    for k in range(3):
        net = separate(layers, k)
        adam = torch.optim.Adam(net.parameters(), lr=SMALL.learning_rate, eps=toy.EPSILON)
        for _ in range(SMALL.policy_steps):
            policy = net(torch.eye(8)).softmax(-1)
            adam.zero_grad()
            (-(policy * torch.from_numpy(rewards[k]).float()).sum() / 8).backward()
            adam.step()
        np.testing.assert_allclose(policies[k], net(torch.eye(8)).softmax(-1).detach(), atol=2e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_policies_come_near_to_the_best_that_rewards_allow(sampled):
    """Not onto it: a policy may settle on a second-best response, where its gradient vanishes."""
    rewards = np.random.default_rng(3).standard_normal((5, 8, 8))
    settings = toy.Settings(hidden=32, policy_steps=150, sampled=sampled)
    policy = (
        toy.ppo_policies(rewards, settings, 0)
        if sampled
        else toy.train_policies(toy.expected(rewards), 5, settings, 0)
    )
    reached = (policy * rewards).sum(2).mean()
    assert reached > 0.8 * rewards.max(2).mean() > 5 * rewards.mean()


def test_a_rule_of_the_toy_takes_the_further_models_and_the_mean_all_four():
    models = np.random.default_rng(4).standard_normal((2, 4, 8, 8))
    np.testing.assert_allclose(toy.of_rule(models, 1.0), models[:, 0])
    np.testing.assert_allclose(toy.of_rule(models, 0.0), models[:, 1:].min(1))
    np.testing.assert_allclose(toy.of_rule(models, 0.4), 0.4 * models[:, 0] + 0.6 * models[:, 1:].min(1))
    np.testing.assert_allclose(toy.of_rule(models, "mean"), models.mean(1))
    np.testing.assert_allclose(toy.of_rule(models, "max"), models.max(1))


def test_a_rule_beyond_its_range_is_refused():
    with pytest.raises(ValueError, match="rule: expected"):
        integrated(np.zeros(3), np.zeros((3, 2)), 1.2)
    with pytest.raises(ValueError, match="rule: expected"):
        integrated(np.zeros(3), np.zeros((3, 2)), "median")


def test_equation_6_mixes_where_the_pointwise_minimum_settles():
    """Two reward functions that like one response each, and a third response that both like a little."""
    members = np.array([[1.0, 0.0, 0.4], [0.0, 1.0, 0.4]])[None, :, None, :]
    nothing = np.zeros((1, 1, 3))
    found = worst_return_policy(nothing, members, 0.0, 0.01)
    np.testing.assert_allclose(found.policy[0, 0], [0.5, 0.5, 0.0], atol=1e-3)
    np.testing.assert_allclose(found.weights[0], [0.5, 0.5], atol=1e-3)
    pointwise = np.array([[[0.0, 0.0, 1.0]]])  # the only response whose lowest reward is not 0
    values = [robust_value(one, nothing, members, 0.0, 0.0)[0] for one in (found.policy, pointwise)]
    assert values == pytest.approx([0.5, 0.4], abs=1e-3)


def test_equation_7_is_solved():
    """Its value reaches its bound, and a general solver finds nothing better."""
    random = np.random.default_rng(5)
    nominal, members = random.standard_normal((4, 2, 5)), random.standard_normal((4, 3, 2, 5))
    beta = np.array([0.2, 0.5, 1.0, 2.0])
    found = worst_return_policy(nominal, members, 0.3, beta)
    np.testing.assert_allclose(found.policy.sum(-1), 1)
    assert (found.value <= found.bound + 1e-12).all() and (found.bound - found.value).max() < 1e-3
    for k in range(4):

        def loss(logits, k=k):
            policy = np.exp(logits.reshape(1, 2, 5))
            policy /= policy.sum(-1, keepdims=True)
            return -robust_value(policy, nominal[k : k + 1], members[k : k + 1], 0.3, beta[k])[0]

        starts = [np.log(found.policy[k]).ravel(), np.zeros(10)]
        best = max(
            -minimize(loss, one, method="Nelder-Mead", options={"maxiter": 4000}).fun for one in starts
        )
        assert best <= found.bound[k] + 1e-9 and found.value[k] >= best - 1e-3


def test_equation_6_as_trained_in_the_toy_is_its_closed_form():
    """The network's subgradient ascent comes near to the value that no policy exceeds."""
    models = np.random.default_rng(6).standard_normal((4, 4, 8, 8))
    settings = toy.Settings(hidden=32, policy_steps=400)
    policy = toy.play(models, ["returns"], settings, 0)["returns"]
    nominal, members = models[:, 0], models[:, 1:]
    bound = worst_return_policy(nominal, members, 0.4, 0.02).bound
    value = robust_value(policy, nominal, members, 0.4, 0.02)
    pointwise = toy.play(models, [0.4], settings, 0)[0.4]
    assert (value <= bound + 1e-6).all() and (value > bound - 0.15).all()
    assert (value > robust_value(pointwise, nominal, members, 0.4, 0.02)).all()
