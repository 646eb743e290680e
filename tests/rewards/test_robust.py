"""BRME and reward-robust rewards against independent computations."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch.nn import functional

from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards import robust
from vaalign_lib.rewards.base import Unit
from vaalign_lib.rewards.robust import Mixture, Stochastic
from vaalign_lib.theory.robust import integrated
from vaalign_lib.training.objectives import Outcome, reward_robust

SETTINGS = HeadTraining(
    batch_size=32,
    learning_rate=0.02,
    optimizer="adamw_torch",
    weight_decay=0.0,
    scheduler="constant",
    epochs=30,
)


@pytest.fixture(scope="module")
def linear():
    """Pairs whose preference is linear in features: chosen, rejected (pairs, F), p(chosen > rejected)."""
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1000, 6, generator=random) for _ in range(2))
    gap = (first - second) @ torch.tensor([1.0, -0.5, 0.3, 0.0, 0.0, 0.8])
    better = (gap > 0)[:, None]
    return torch.where(better, first, second), torch.where(better, second, first), torch.sigmoid(gap.abs())


def test_the_expected_gradient_by_sigma_is_twice_sigma():
    """Appendix B, against automatic differentiation and many draws."""
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(400_000, generator=random)
    for mean, sigma, target in ((0.3, 0.5, 2.0), (-1.0, 1.5, 0.7)):
        deviation = torch.tensor(sigma, requires_grad=True)
        loss = robust.mse_loss(mean + noise * deviation, torch.zeros(()), torch.tensor(target)) - target**2
        (gradient,) = torch.autograd.grad(loss.mean(), deviation)
        error = (2 * noise * (mean + noise * sigma - target)).std() / len(noise) ** 0.5
        assert abs(gradient.item() - 2 * sigma) < 4 * error
        assert loss.mean().item() == pytest.approx(
            (mean - target) ** 2 + sigma**2, abs=4 * loss.std().item() / 632
        )


def test_as_printed_both_responses_have_one_target_and_nothing_is_learned(linear):
    """With the sign of the rejected one's reversed the same heads rank pairs rightly."""
    chosen, rejected, preferred = linear
    options = {"settings": SETTINGS, "seed": 0, "ensembles": 2}
    right = {}
    for loss in (robust.printed_loss, robust.mse_loss):
        heads = robust.train_gaussian_heads(chosen, rejected, preferred, loss=loss, **options)
        gap = heads(chosen)[0] - heads(rejected)[0]  # (E, H, pairs)
        right[loss.__name__] = (gap > 0).double().mean().item()
    assert right["mse_loss"] > 0.85
    assert right["printed_loss"] < right["mse_loss"] - 0.2


def test_a_grid_of_heads_is_as_many_heads_trained_alone(linear):
    """Each head by a loop of its own, on its fifth of the pairs, with the same draws."""
    chosen, rejected, preferred = linear
    settings = SETTINGS.model_copy(update={"epochs": 2})
    heads = robust.train_gaussian_heads(
        chosen, rejected, preferred, settings=settings, seed=3, ensembles=2, heads=5
    )
    random = torch.Generator().manual_seed(3)
    order = torch.rand(2, 1000, generator=random).argsort(1)
    rows = order.reshape(10, 200)
    assert all(sorted(row.tolist()) == list(range(1000)) for row in order)  # every pair has one head
    weight, draws = 0.02 * torch.randn(10, 2, 6, generator=random), []
    for step, batch in robust.batches(rows, settings, random, ""):
        draws.append((step, batch, torch.randn(batch.shape, generator=random)))
    both = torch.cat([chosen, rejected])
    scaled = [(one - both.mean(0)) / both.std(0) for one in (chosen, rejected)]
    for k in (0, 7):
        own = [weight[k].clone().requires_grad_(), torch.zeros(2, requires_grad=True)]
        adam = torch.optim.AdamW(own, lr=settings.learning_rate, weight_decay=0.0)
        for _, batch, noise in draws:
            loss = torch.zeros(())
            for side, sign in zip(scaled, (1, -1), strict=True):
                out = side[batch[k]] @ own[0].T + own[1]
                reward = out[:, 0] + noise[k] * functional.softplus(out[:, 1])
                loss = loss + ((reward - sign * 10 * (preferred[batch[k]] - 0.5)) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        trained = heads.weight.flatten(0, 1)[k], heads.bias.flatten(0, 1)[k]
        for one, other in zip(own, trained, strict=True):
            torch.testing.assert_close(one.detach(), other, atol=1e-4, rtol=1e-3)
    own = heads.of(chosen[:4], np.array([1, 0, 1, 0]))
    whole = [one.double().numpy() for one in heads(chosen[:4])]  # (E, H, R)
    for some, every in zip(own, whole, strict=True):
        np.testing.assert_allclose(some, [every[e, :, r] for r, e in enumerate((1, 0, 1, 0))], rtol=1e-5)


def test_the_nominal_head_is_the_one_of_smallest_deviation():
    means, deviations = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([[3, 1, 2], [1, 2, 0.5]])
    np.testing.assert_array_equal(robust.nominal(means, deviations), [2.0, 6.0])
    np.testing.assert_array_equal(robust.nominal(means.T, deviations.T, axis=0), [2.0, 6.0])


def test_sigma_forgets_the_noise_of_labels_and_a_likelihood_keeps_it():
    paths = robust.sigma_paths([0.2, 1.0], [1.0, 1.0], 1500, 20, 0)[-1].mean(0)
    assert paths.max() < 0.2 and abs(np.log(paths[1] / paths[0])) < 0.3
    kept = robust.sigma_paths([0.2, 1.0], [1.0, 1.0], 3000, 20, 0, likelihood=True)[-1].mean(0)
    assert kept[1] / kept[0] > 2.5
    rare = robust.sigma_paths([0.0, 0.0], [1.0, 0.2], 500, 20, 0)[-1].mean(0)
    assert rare[1] > 2 * rare[0]  # it says how often a text was seen


RULES = (0.0, 0.4, 1.0, "mean", "max")


def scores_of(prompts, responses, ensemble):
    """Three members whose scores are known from the text, and of another scale in the second ensemble."""
    length = np.array([len(one) for one in responses], dtype=float)
    members = np.stack([length, 10 - length, 0.5 * length], 1) * (1 + ensemble)[:, None]
    return members[:, 2], members


def test_a_mixture_is_equation_7_of_standardized_parts():
    texts = ["a", "bbb", "cccc", "dddddddd"]
    asked = ["p"] * 4
    parts = np.stack([robust.parts_of(scores_of(asked, texts, np.full(4, e))) for e in (0, 1)])  # (E, K, R)
    units = robust.units_of(parts)
    weights = np.array([robust.weights_of(rule) for rule in RULES])
    source = Mixture(
        lambda *of: robust.parts_of(scores_of(*of)), units, weights, lambda p, r: np.zeros(len(p))
    )
    for policy in range(2 * len(RULES)):
        rule, ensemble = RULES[policy % 5], policy // 5
        judged = source.judge(asked, texts, np.full(4, policy)).sample(np.zeros(4))
        scaled = (parts[ensemble] - parts[ensemble].mean(1, keepdims=True)) / parts[ensemble].std(
            1, keepdims=True
        )
        if isinstance(rule, str):
            expected = scaled[robust.PARTS.index(rule)]
            np.testing.assert_allclose(judged.std(), 1)
        else:
            said = [torch.from_numpy(one)[None] for one in (scaled[0], scaled[0], scaled[1], scaled[1])]
            expected = (
                reward_robust(Outcome(*said), torch.zeros(1, 1), torch.tensor([[rule]])).score[0].numpy()
            )
            np.testing.assert_allclose(expected, integrated(scaled[0], scaled[1][:, None], rule))
        np.testing.assert_allclose(judged, expected, atol=1e-12)


def test_rewards_that_do_not_differ_have_no_unit():
    with pytest.raises(ValueError, match="rewards that differ"):
        robust.units_of(np.ones((2, 3)))


def test_rewards_that_say_nothing_have_the_distribution_they_are_said_to_have():
    source = Stochastic((0.5, 0.0, 0.0), (0, 1, 5), lambda p, r: np.zeros(len(p)))
    uniforms = np.random.default_rng(0).random(30_000)
    policy = np.arange(30_000) % 3
    judgement = source.judge([""] * 30_000, [""] * 30_000, policy)
    rewards = judgement.sample(uniforms)
    assert (rewards[policy == 0] == 0.5).all()
    assert kstest(rewards[policy == 1], norm.cdf).pvalue > 0.01
    drawn = np.random.default_rng(1).standard_normal((10_000, 5)).min(1)
    assert kstest(rewards[policy == 2], drawn).pvalue > 0.01
    assert robust.order_mean(5) == pytest.approx(drawn.mean(), abs=0.03)
    assert robust.order_mean(1) == pytest.approx(0, abs=1e-9)
    kept = Unit().of_judgement(judgement, uniforms, np.ones(30_000))[0]
    np.testing.assert_array_equal(kept, rewards)
