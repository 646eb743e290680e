"""URM and URME: losses, heads, gating and what members disagree about, against independent computations."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards.attributes import (
    AttributeHeads,
    Gating,
    Ratings,
    largest_covariance,
    largest_gap,
    likelihood_loss,
    merged,
    regression_loss,
    reward,
    reward_variance,
    total_variance,
    train_attribute_backbones,
    train_attributes,
    train_gating,
)
from vaalign_lib.rewards.classifier import new_reward_model

H, N, K, D = 3, 40, 5, 7


def drawn(seed=0, heads=H):
    random = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(heads, K, 2, D, generator=random, dtype=torch.float64)
    bias = 0.2 * torch.randn(heads, K, 2, generator=random, dtype=torch.float64)
    features = torch.randn(N, D, generator=random, dtype=torch.float64)
    return AttributeHeads(weight, bias), features, random


def training(**changes):
    settings = {"batch_size": 200, "learning_rate": 0.03, "optimizer": "adamw_torch", "weight_decay": 0.0}
    return HeadTraining(**settings | {"scheduler": "cosine", "epochs": 200} | changes)


def test_one_linear_layer_in_the_published_layout():
    """URM's forward pass: score.weight (2 K, d), viewed as (K, 2): mean, log standard deviation."""
    heads, features, _ = drawn()
    told = heads.ratings(features)
    assert told.means.shape == (H, N, K)
    for h in range(H):
        score = nn.Linear(D, 2 * K).double()
        score.weight.data, score.bias.data = heads.weight[h].reshape(2 * K, D), heads.bias[h].reshape(2 * K)
        pairs = score(features).view(N, K, 2)
        assert torch.allclose(told.means[h], pairs[..., 0]) and torch.allclose(
            told.log_deviations[h], pairs[..., 1]
        )
    own = features.expand(H, N, D).clone()
    own[1] = own[1].flip(0)
    assert torch.allclose(heads.ratings(own).means[1], told.means[1].flip(0))
    assert torch.equal(heads[1:2].ratings(features).means[0], told.means[1])


def test_equation_4_is_the_normal_log_likelihood():
    heads, features, random = drawn()
    told, scores = heads.ratings(features), torch.randn(H, N, K, generator=random, dtype=torch.float64)
    normal = torch.distributions.Normal(told.means, told.log_deviations.exp())
    assert torch.allclose(likelihood_loss(told, scores), -normal.log_prob(scores).sum(-1).mean(-1))


def test_equation_5_is_squared_error_plus_variance_on_average():
    heads, features, random = drawn()
    told, scores = heads.ratings(features), torch.randn(H, N, K, generator=random, dtype=torch.float64)
    plain = ((told.means - scores) ** 2).sum(-1).mean(-1)
    assert torch.allclose(regression_loss(told, scores, torch.zeros_like(scores)), plain)
    draws = [
        regression_loss(told, scores, torch.randn(H, N, K, generator=random, dtype=torch.float64))
        for _ in range(4000)
    ]
    sampled, expected = torch.stack(draws), plain + told.variances.sum(-1).mean(-1)
    error = sampled.std(0) / math.sqrt(len(draws))
    assert ((sampled.mean(0) - expected).abs() < 4 * error).all() and (error < 0.01 * expected).all()


def ratings_of(texts, raters, seed, width=3):
    """Draw features and ratings of two attributes whose mean and log deviation are linear in features."""
    random = np.random.default_rng(seed)
    features = 2.0 + 3.0 * random.standard_normal((texts, width))
    means = np.stack([0.5 * features[:, 0] - 1, features[:, 1]], axis=1)
    logs = np.stack([0.2 * features[:, 2] - 1.0, -0.1 * features[:, 0]], axis=1)
    noise = random.standard_normal((texts, raters, 2))
    scores = means[:, None] + np.exp(logs)[:, None] * noise
    return torch.from_numpy(features), torch.from_numpy(scores), means, logs


def test_likelihood_finds_means_and_variances_that_a_general_solver_finds():
    features, scores, _, _ = ratings_of(300, 2, 1)
    rows = torch.arange(600).repeat(2, 1)
    heads = train_attributes(features, scores, rows, loss="mle", settings=training(epochs=200), seed=3)
    design = np.column_stack([features.numpy(), np.ones(300)]).repeat(2, axis=0)
    labels = scores.flatten(0, 1).numpy()[:, 1]

    def loss(parameters):
        mean, log = design @ parameters[:4], design @ parameters[4:]
        return (0.5 * ((labels - mean) / np.exp(log)) ** 2 + log).mean()

    best = minimize(loss, np.zeros(8), method="BFGS", options={"gtol": 1e-7})
    for h in range(2):
        found = torch.cat([heads.weight[h, 1], heads.bias[h, 1][:, None]], 1).flatten().numpy()
        assert np.allclose(found, best.x, atol=0.01)


def test_likelihood_learns_the_raters_variance_and_regression_forgets_it():
    features, scores, means, logs = ratings_of(1000, 4, 2)
    rows = torch.arange(4000)[None]
    told = {
        loss: train_attributes(
            features, scores, rows, loss=loss, settings=training(epochs=25), seed=0
        ).ratings(features)
        for loss in ("mle", "regression", "deterministic")
    }
    learned = told["mle"].log_deviations[0].numpy()
    assert np.abs(learned - logs).mean() < 0.05
    assert np.abs(told["mle"].means[0].numpy() - means).mean() < 0.06
    assert told["regression"].log_deviations.exp().mean() < 0.5 * np.exp(logs).mean()  # on its way to 0
    assert (told["deterministic"].variances == 0).all()


def test_the_deterministic_twin_is_least_squares():
    features, scores, _, _ = ratings_of(300, 2, 4)
    rows = torch.arange(600)[None]
    heads = train_attributes(
        features, scores, rows, loss="deterministic", settings=training(epochs=200), seed=0
    )
    design = np.column_stack([features.numpy(), np.ones(300)]).repeat(2, axis=0)
    wanted = np.linalg.lstsq(design, scores.flatten(0, 1).numpy(), rcond=None)[0]
    found = torch.cat([heads.weight[0, :, 0], heads.bias[0, :, :1]], 1).T.numpy()
    assert np.allclose(found, wanted, atol=0.02)


def test_heads_side_by_side_do_not_see_each_other():
    features, scores, _, _ = ratings_of(100, 2, 5)
    rows = torch.arange(200).repeat(3, 1)
    others = rows.clone()
    others[2] = 0  # one head learns something else
    first, second = (
        train_attributes(features, scores, one, loss="mle", settings=training(epochs=3), seed=1)
        for one in (rows, others)
    )
    assert torch.allclose(first.weight[:2], second.weight[:2], atol=1e-12)
    assert (first.weight[2] - second.weight[2]).abs().max() > 1e-3
    assert (first.weight[0] - first.weight[1]).abs().max() > 1e-4  # own fresh weights and batches


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "bayes"}, "loss: expected one of mle, regression, deterministic"),
        ({"scores": torch.zeros(9, 2, 2).double()}, "features, scores: expected"),
        ({"features": torch.full((100, 3), torch.nan).double()}, "features: expected finite"),
        ({"rows": torch.tensor([[200]])}, "rows: expected .* 0 to 199"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(changes, told):
    features, scores, _, _ = ratings_of(100, 2, 5)
    given = {"features": features, "scores": scores, "rows": torch.arange(200)[None], "loss": "mle"}
    with pytest.raises(ValueError, match=told):
        train_attributes(**given | changes, settings=training(), seed=0)


def gatings(random, hidden=6):
    sizes = {"0": (hidden, D), "2": (hidden, hidden), "4": (K, hidden)}
    weights = {}
    for name, (out, into) in sizes.items():
        weights[f"{name}.weight"] = torch.randn(H, out, into, generator=random, dtype=torch.float64)
        weights[f"{name}.bias"] = torch.randn(H, out, generator=random, dtype=torch.float64)
    return Gating(weights)


def test_the_gating_is_two_hidden_layers_with_selu_and_no_softmax():
    heads, features, random = drawn()
    gating = gatings(random)
    weights = gating(features)
    for h in range(H):
        layers = nn.Sequential(nn.Linear(D, 6), nn.SELU(), nn.Linear(6, 6), nn.SELU(), nn.Linear(6, K))
        layers.double().load_state_dict({name: one[h] for name, one in gating.weights.items()})
        assert torch.allclose(weights[h], layers(features))
    told = heads.ratings(features)
    by_hand = sum(told.means[..., k] * weights[..., k] for k in range(K))
    assert torch.allclose(reward(told, weights), by_hand)


def test_the_variance_of_the_reward_is_that_of_a_weighted_sum():
    heads, features, random = drawn()
    told, weights = heads.ratings(features[:4]), gatings(random)(features[:4])
    drawn_scores = told.means + told.log_deviations.exp() * torch.randn(
        200_000, H, 4, K, generator=random, dtype=torch.float64
    )
    sampled = (drawn_scores * weights).sum(-1)
    assert torch.allclose(reward_variance(told, weights), sampled.var(0), rtol=0.02)
    plain = drawn_scores.var(0).sum(-1)
    assert torch.allclose(reward_variance(told, weights, "plain"), plain, rtol=0.02)


def test_gating_learns_which_attribute_counts_and_leaves_the_heads_alone():
    heads, _, random = drawn(heads=2)
    heads = AttributeHeads(heads.weight.float(), heads.bias.float())
    kept = heads.weight.clone()
    chosen, rejected = torch.randn(2, 2000, D, generator=random) * 2 + 1
    means = [heads.ratings(one).means[0] for one in (chosen, rejected)]
    better = (means[0] - means[1])[:, 2] > 0  # by the third attribute of the first head
    up, down = torch.where(better[:, None], chosen, rejected), torch.where(better[:, None], rejected, chosen)
    settings = training(batch_size=100, learning_rate=0.005, epochs=8)
    gating = train_gating(up[:1500], down[:1500], heads, settings=settings, hidden=16, seed=0)
    gaps = [reward(heads.ratings(one[1500:]), gating(one[1500:])) for one in (up, down)]
    assert ((gaps[0] - gaps[1]) > 0).float().mean(1)[0] > 0.93
    assert torch.equal(heads.weight, kept)
    fresh = train_gating(
        up[:1500], down[:1500], heads, settings=training(epochs=1e-9, learning_rate=1e-10), hidden=16, seed=0
    )
    hidden = torch.nn.functional.selu(up @ fresh.weights["0.weight"][0].T + fresh.weights["0.bias"][0])
    assert hidden.var() == pytest.approx(1, abs=0.35)  # features are standardized, weights LeCun normal


def test_merging_is_the_mean_and_the_geometric_mean_on_one_backbone():
    heads, features, _ = drawn(heads=6)
    told, one = heads.ratings(features), merged(heads, 3).ratings(features)
    assert one.means.shape == (2, N, K)
    groups = told.means.reshape(2, 3, N, K).mean(1), told.log_deviations.exp().reshape(2, 3, N, K)
    assert torch.allclose(one.means, groups[0])
    assert torch.allclose(one.log_deviations.exp(), groups[1].prod(1) ** (1 / 3))


def test_equations_7_and_8_by_hand():
    heads, features, _ = drawn()
    told = heads.ratings(features)
    rewards = reward(told, torch.ones(K, dtype=torch.float64))
    gaps = [max(abs(float(a - b)) for a in column for b in column) for column in rewards.T]
    assert np.allclose(largest_gap(rewards), gaps)
    norms = [
        max(float(np.linalg.norm(np.diag(told.variances[h, n].numpy()))) for h in range(H)) for n in range(N)
    ]
    assert np.allclose(largest_covariance(told.variances), norms)


def test_the_law_of_total_variance():
    heads, features, random = drawn()
    told = heads.ratings(features[:3])
    weights = torch.linspace(-1, 1, K, dtype=torch.float64)
    means, variances = reward(told, weights), reward_variance(told, weights)
    aleatoric, epistemic = total_variance(means, variances)
    member = torch.randint(H, (400_000,), generator=random)
    noise = torch.randn(400_000, 3, generator=random, dtype=torch.float64)
    mixture = means[member] + variances[member].sqrt() * noise
    assert torch.allclose(aleatoric + epistemic, mixture.var(0), rtol=0.02)
    alone = total_variance(means[:1], variances[:1])
    assert torch.equal(alone[0], variances[0]) and (alone[1] == 0).all()


def test_trained_backbones_are_separate_models_and_merge_by_weight():
    """The stack's forward pass against an ordinary model of each member's weights."""
    model, _ = new_reward_model("tiny-gemma", 16, 0)
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 60, (length,), generator=random).tolist() for length in (5, 9, 12, 7)]
    scores = torch.randn(4, 2, K, generator=random)
    heads = AttributeHeads(0.1 * torch.randn(2, K, 2, 16, generator=random), torch.zeros(2, K, 2))
    settings = training(batch_size=4, learning_rate=0.01, epochs=3)
    rows = torch.arange(8).repeat(2, 1)
    trained = train_attribute_backbones(
        model, heads, ids, scores, rows, loss="mle", settings=settings, seed=0
    )
    for stack in (trained, trained.merged()):
        told = stack.ratings(ids)
        for h in range(len(stack.heads.weight)):
            one = copy.deepcopy(model).eval()
            one.load_state_dict({name: w[h] for name, w in stack.weights.items()}, strict=False)
            state = torch.stack([one.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids])
            own = stack.heads[h : h + 1].ratings(state)
            assert torch.allclose(told.means[h], own.means[0], atol=1e-5)
            assert torch.allclose(told.log_deviations[h], own.log_deviations[0], atol=1e-5)
    name = next(iter(trained.weights))
    assert torch.allclose(trained.merged().weights[name][0], trained.weights[name].mean(0))
    assert (trained.weights[name][0] - trained.weights[name][1]).abs().max() > 1e-4
    before = likelihood_loss(heads.ratings(features_of(model, ids)), scores[:, 0])
    assert (likelihood_loss(trained.ratings(ids), scores[:, 0]) < before).all()


def features_of(model, ids):
    with torch.no_grad():
        return torch.stack([model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids])


def test_distributions_have_positive_variances():
    told = Ratings(torch.zeros(1, 2, K), torch.log(torch.full((1, 2, K), 3.0)))
    assert torch.allclose(told.variances, torch.full((1, 2, K), 9.0))
