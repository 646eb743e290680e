"""Best-of-n and the tilt against simulation and closed forms."""

import numpy as np
import pytest
from scipy.stats import entropy

from vaalign_lib.policies.best_of_n import best_of_n, best_of_n_kl, best_of_n_weights, gains, tilt


def test_weights_are_how_often_a_rank_wins_when_n_are_drawn():
    random = np.random.default_rng(0)
    draws = np.array([random.choice(8, 3, replace=False).max() for _ in range(40_000)])
    frequency = np.bincount(draws, minlength=8) / len(draws)
    weights = best_of_n_weights(8, 3)
    assert weights.sum() == pytest.approx(1)
    assert (np.abs(frequency - weights) < 4.5 * np.sqrt(weights * (1 - weights) / 40_000) + 1e-12).all()


def test_best_of_one_is_the_mean_and_of_all_the_maximum():
    random = np.random.default_rng(1)
    proxy, gold = random.normal(size=(2, 5, 16))
    assert best_of_n(proxy, gold, 1)[1] == pytest.approx(gold.mean(1))
    chosen = gold[np.arange(5), proxy.argmax(1)]
    assert best_of_n(proxy, gold, 16)[1] == pytest.approx(chosen)
    with pytest.raises(ValueError, match="expected 1 to 16, got 17"):
        best_of_n(proxy, gold, 17)


def test_kl_of_best_of_n_for_a_continuous_reward():
    grid = (np.arange(200_000) + 0.5) / 200_000  # quantile of the response
    density = 4 * grid**3  # of the best of four
    assert best_of_n_kl(4) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)
    assert best_of_n_kl(1) == 0


def test_tilt_is_the_exponential_family_over_the_samples():
    random = np.random.default_rng(2)
    proxy, gold = random.normal(size=(2, 4, 10))
    policy = np.exp(proxy / 0.5)
    policy /= policy.sum(1, keepdims=True)
    proxy_mean, gold_mean, kl = tilt(proxy, gold, 0.5)
    assert proxy_mean == pytest.approx((policy * proxy).sum(1))
    assert gold_mean == pytest.approx((policy * gold).sum(1))
    assert kl == pytest.approx(entropy(policy, np.full((4, 10), 0.1), axis=1))


def test_gold_gains_what_it_says_and_noise_gains_nothing():
    random = np.random.default_rng(3)
    gold = random.normal(size=(400, 16))
    category = np.repeat(["a", "b"], 200)
    table = gains({"gold": gold, "noise": random.normal(size=(400, 16))}, gold, category, ns=(1, 16))
    best = table[(table["method"] == "best of n") & (table["setting"] == 16)].set_index("proxy")
    assert best.loc["gold", "gain"].to_numpy() == pytest.approx([1.766] * 2, abs=0.2)  # E max of 16
    assert (best.loc["noise", "gain"].abs() < 4 * best.loc["noise", "error"]).all()
    assert (table[table["setting"] == 1]["gain"].abs() < 1e-9).sum() >= 4
