"""Critics: ridge regression by another way, and what their features remember."""

import numpy as np
import pytest
import torch

from tests.small_problem import TableReward, policy, trainer
from vaalign_lib.policies.sampling import Prompts, sequences
from vaalign_lib.training import critic as critics
from vaalign_lib.training.critic import FEATURES, RIDGE, Critic, layers_seen, reference_features
from vaalign_lib.training.objectives import Method


@pytest.mark.parametrize("at_a_time", [2**26, 300])  # at once, and in pieces of 42 tokens
def test_the_warm_up_is_ridge_regression_on_standardized_features(at_a_time, monkeypatch):
    monkeypatch.setattr(critics, "AT_A_TIME", at_a_time)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, 7, generator=random) * torch.linspace(0.5, 3, 7) + 2
    mask = torch.arange(5) < torch.randint(1, 6, (60, 1), generator=random)
    scores = torch.randn(3, 60, generator=random) + features[:, 0, 0]
    critic = Critic("reference_states", 3, features, mask)
    critic.fit(features, mask, scores)
    fitted = np.arange(60) % 5 != 4
    tokens = mask.numpy() & fitted[:, None]
    centre, unit = features[mask].mean(0).numpy(), features[mask].std(0).numpy()
    design = ((features.numpy() - centre) / unit)[tokens]
    for j in range(3):
        target = np.broadcast_to(scores[j].numpy()[:, None], mask.shape)[tokens]
        padded = np.vstack([design, np.sqrt(RIDGE) * np.eye(7)])  # ridge as least squares
        weight = np.linalg.lstsq(padded, np.append(target - target.mean(), np.zeros(7)), rcond=None)[0]
        np.testing.assert_allclose(critic.weight[j].detach(), weight, atol=1e-3)
        gram = design @ design.T + RIDGE * np.eye(len(design))  # and by its dual
        dual = design.T @ np.linalg.solve(gram, target - target.mean())
        np.testing.assert_allclose(critic.weight[j].detach(), dual, atol=1e-3)
        values = critic.values(features.repeat(3, 1, 1))[j]
        expected = ((features.numpy() - centre) / unit) @ weight + target.mean()
        np.testing.assert_allclose(values.detach(), expected, atol=2e-3)


def test_the_share_explained_is_measured_where_it_was_not_fitted():
    random = torch.Generator().manual_seed(1)
    features = torch.randn(400, 3, 4, generator=random)
    mask = torch.ones(400, 3, dtype=torch.bool)
    critic = Critic("reference_states", 2, features, mask)
    known = features.sum((1, 2))  # a third of it is seen at each token
    noise = torch.randn(400, generator=random)
    assert 0.25 < critic.fit(features, mask, torch.stack((known, known))) < 0.42
    assert critic.fit(features, mask, torch.stack((noise, noise))) < 0.05


def test_features_of_the_reference_are_states_and_sums_of_earlier_tokens():
    random = torch.Generator().manual_seed(2)
    states = tuple(torch.randn(2, 4, 3, generator=random) for _ in range(2))
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    features = reference_features(states, mask)
    assert features.shape == (2, 4, 12)
    layers = torch.cat(states, -1)
    torch.testing.assert_close(features[..., :6], layers)
    torch.testing.assert_close(features[0, 3, 6:], layers[0, :3].sum(0) / 10)
    assert not features[:, 0, 6:].any()  # nothing was said before the first token
    torch.testing.assert_close(features[1, 3, 6:], layers[1, :2].sum(0) / 10)  # padding says nothing


def test_layers_are_all_of_a_tiny_model_and_never_more_features_than_they_may_make():
    assert layers_seen(2, 32) == [0, 1, 2] and layers_seen(4, 128) == [0, 1, 2, 3, 4]
    assert layers_seen(30, 576) == [0, 15, 30]  # of a model of 135 million weights
    assert layers_seen(32, 4096) == [32] and layers_seen(12, 2048) == [12]
    for width in (16, 100, 500, 2048):
        seen = layers_seen(40, width)
        assert 2 * width * len(seen) <= FEATURES and seen[-1] == 40 and len(set(seen)) == len(seen)
        assert np.diff(seen).size == 0 or np.ptp(np.diff(seen)) <= 1


def test_a_trainers_critic_sees_the_layers_chosen_for_its_model(monkeypatch):
    monkeypatch.setattr(critics, "FEATURES", 64)  # two layers of width 16
    source = TableReward(lambda p, r: float(r.count("4")), lambda p, r: 1.0)
    one = trainer(2, source, ["2", "3"], method=Method(), words=9, tokens=6,
                  model=lambda: policy(9, layers=4))  # fmt: skip
    assert one.critic.weight.shape == (2, 64)
    assert one.critic.weight.any(1).all() and one.train(2).notna().all().all()
    prompts = Prompts.from_lists([[2, 3], [4]], 2, 0)
    joined = sequences(prompts, torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.float32)
    every, some = one.reference.all_states(joined), one.reference.all_states(joined, [0, 4])
    assert len(every) == 5 and torch.equal(every[0], some[0]) and torch.equal(every[4], some[1])
