"""The bandit of Figures 2 and 3: its parameters meet what the paper prints."""

import dataclasses

import numpy as np
import pytest

from vaalign_lib.papers.printed import printed_value
from vaalign_lib.theory import bounds
from vaalign_lib.theory.bandit import (
    FORMS,
    Bandit,
    fully_reversed,
    published_bandits,
    typical_reversed_estimates,
)

BANDITS = published_bandits()


def test_every_form_has_a_set_of_arms():
    assert set(BANDITS) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_arms_meet_everything_printed(form):
    bandit = BANDITS[form]
    assert (np.diff(bandit.rewards) > 0).all()
    assert round(bandit.base_return, 4) == printed_value("figure3.base_return")
    estimates = bandit.draw(np.random.default_rng(1), 200_000)
    vanilla, aware = ((returns <= bandit.base_return).mean() for returns in bandit.returns(estimates))
    assert vanilla == pytest.approx(printed_value("figure3.vanilla.underperformance"), abs=0.005)
    assert aware == pytest.approx(printed_value("figure3.variance_aware.underperformance"), abs=0.0004)


@pytest.mark.parametrize("form", ["free", "sum_to_one"])
def test_closed_forms_confirm_the_risks(form):
    bandit = BANDITS[form]
    assert bounds.vanilla_risk(bandit.rewards, bandit.variances, form) == pytest.approx(0.39, abs=1e-3)
    risk = bounds.variance_aware_risk(bandit.rewards, bandit.variances, form)
    assert risk == pytest.approx(0.0015, abs=2e-5)


def test_threshold_policies_never_gain_on_reversed_estimates():
    """The ordering lemma of notebook 01, on random arms, strengths and reversed estimates."""
    rng = np.random.default_rng(2)
    for _ in range(60):
        rewards = np.sort(rng.normal(size=4))
        deviations = rng.lognormal(0, 1, 4)
        estimates = -np.sort(-rng.normal(0, 2, (200, 4)), axis=-1)
        strength = rng.uniform(0.05, 2)
        for form in ("sum_to_one", "simplex", "ppo", "grpo"):
            bandit = Bandit(tuple(rewards), tuple(deviations), form, strength, strength)
            for returns in bandit.returns(estimates):
                assert (returns <= bandit.base_return + 1e-9).all()
    gains = BANDITS["exact"]
    sample = gains.draw(rng, 20_000)
    sample = sample[fully_reversed(sample)]
    assert (gains.returns(sample)[1] > gains.base_return).mean() > 0.95


def test_reversed_estimates():
    assert fully_reversed(np.array([[3.0, 2, 1], [3, 1, 2], [1, 2, 3]])).tolist() == [True, False, False]
    bandit = BANDITS["exact"]
    shown = typical_reversed_estimates(bandit, np.array([[3.0, 2, 1], [5, 2, 1], [0, 9, 9]]))
    np.testing.assert_array_equal(shown, [4, 2, 1])
    none = typical_reversed_estimates(bandit, np.array([[1.0, 2, 3]]))
    np.testing.assert_array_equal(none, bandit.rewards[::-1])


def test_arms_may_stand_in_any_order():
    """Shuffled arms give the shuffled estimates and tell the same story."""
    bandit, order = BANDITS["exact"], np.array([2, 0, 1])
    shuffled = dataclasses.replace(
        bandit,
        true_rewards=tuple(np.array(bandit.true_rewards)[order]),
        deviations=tuple(np.array(bandit.deviations)[order]),
    )
    for draws in (np.array([[1.0, 2, 3]]), bandit.draw(np.random.default_rng(0), 300)):
        shown = typical_reversed_estimates(shuffled, draws[:, order])
        np.testing.assert_array_equal(shown, typical_reversed_estimates(bandit, draws)[order])
        told = shuffled.tells_figure_2(draws[:, order])
        assert told == bandit.tells_figure_2(draws)
    assert told
