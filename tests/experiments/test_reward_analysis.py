"""The tables of notebook 03 on data whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.reward_tables import (
    Scores,
    calibration_tables,
    gold_errors,
    independent_gaps,
    persistence_table,
    ranked_rightly,
    spread_correlations,
    spread_errors,
    world_table,
)
from vaalign_lib.rewards.heads import Heads
from vaalign_lib.rewards.simulated_judge import stand_ins

RANDOM = np.random.default_rng(0)


def scores_with_noise(gold, deviation):
    """Members that know the gold difference up to noise of their own, in half its unit."""
    noise = deviation[:, None] * RANDOM.normal(size=(len(gold), 10))
    return Scores((gold[:, None] + noise) / 2, np.zeros((len(gold), 10)))


def test_scores_give_the_gap_and_its_sample_variance():
    chosen, rejected = RANDOM.normal(size=(2, 30, 10))
    scores = Scores(chosen, rejected)
    assert scores.gap == pytest.approx(chosen.mean(1) - rejected.mean(1))
    assert scores.gap_variance == pytest.approx((chosen - rejected).var(1, ddof=1))


def test_errors_against_gold_are_in_its_unit_and_calibrated_if_the_members_are():
    parts, tables = {}, {}
    for name in ("held_out", "evaluation"):
        gold = RANDOM.normal(size=4000)
        parts[name] = scores_with_noise(gold, RANDOM.lognormal(-1, 0.5, 4000))
        tables[name] = pd.DataFrame({"gold_chosen": gold, "gold_rejected": 0.0})
    errors, variances = gold_errors(parts, **tables)["evaluation"]
    # the mean of ten members errs with a tenth of a member's variance
    assert (errors**2).mean() == pytest.approx(variances.mean() / 10, rel=0.1)
    errors = gold_errors(parts, **tables)
    _, covered, temperatures = calibration_tables({"the true reward": errors})
    assert temperatures["temperature"].item() == pytest.approx(np.sqrt(0.1 * 9 / 7), rel=0.1)  # E 1/chi2
    repaired = covered[covered["repaired"]].set_index("nominal")["actual"]
    assert repaired[0.95] == pytest.approx(0.95, abs=0.03)


def test_spread_of_independent_ensembles_is_that_of_their_means():
    for ensembles in (4, 80):
        gaps = RANDOM.normal(size=(ensembles, 10, 8000)) * RANDOM.lognormal(size=8000)
        errors, variances = spread_errors(gaps)
        assert np.mean(errors**2 / variances) == pytest.approx(0.1 * 9 / 7, rel=0.1)
    ranks = spread_correlations(gaps)
    assert ranks.shape == (80,) and ranks.min() > 0.8
    assert np.abs(spread_correlations(RANDOM.normal(size=(40, 10, 500)))).max() < 0.3


def test_gaps_of_a_grid_of_heads():
    heads = Heads("paper", {"weight": torch.randn(3, 2, 5)})
    features = {"chosen": torch.randn(7, 5), "rejected": torch.randn(7, 5)}
    gaps = independent_gaps(heads, features)
    one = heads.weights["weight"][1, 0] @ (features["chosen"] - features["rejected"])[4]
    assert gaps.shape == (3, 2, 7) and gaps[1, 0, 4] == pytest.approx(one.item(), rel=1e-4)


def test_ties_of_the_gold_reward_are_not_counted():
    pairs = pd.DataFrame({"gold_chosen": [1.0, 0.0, 1.0], "gold_rejected": [0.0, 1.0, 1.0]})
    correct, counted = ranked_rightly(np.array([0.5, 0.5, 0.5]), pairs)
    assert correct[:2].tolist() == [True, False] and counted.tolist() == [True, True, False]


def test_fresh_judges_forget_and_persistent_ones_do_not():
    world = World(0)
    prompts, responses = world.corpus(12, np.random.default_rng(1))
    judge = stand_ins(world)["stand-in for Gemini 1.5 Flash"]
    table = persistence_table(judge, prompts, responses, judges=1500, queries=5)
    assert (table["persistent"] / table["interval"]).to_numpy() == pytest.approx(np.ones(12), abs=0.2)
    assert (table["fresh"] / table["interval"]).to_numpy() == pytest.approx(np.full(12, 0.2), abs=0.04)


def test_world_table_has_the_three_settings():
    prompts, responses = World(0).corpus(300, np.random.default_rng(2))
    table = world_table(0, prompts, responses).groupby("setting")["correlation"].first()
    assert table["poor"] < -0.4 < table["none"] < 0.4 < table["good"]
