"""Critics: ridge regression by another way, and what their features remember."""

import numpy as np
import torch

from vaalign_lib.critics import RIDGE, Critic, reference_features


def test_the_warm_up_is_ridge_regression_on_standardized_features():
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
        weight = np.linalg.lstsq(
            padded, np.append(target - target.mean(), np.zeros(7)), rcond=None
        )[0]
        np.testing.assert_allclose(critic.weight[j].detach(), weight, atol=1e-3)
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
    torch.testing.assert_close(
        features[1, 3, 6:], layers[1, :2].sum(0) / 10
    )  # padding says nothing
