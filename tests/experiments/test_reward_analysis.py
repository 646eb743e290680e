"""The tables of notebook 03 on data whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, pearsonr

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.reward_tables import (
    Scores,
    assumption_tests,
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


def retrained(noise, bias=0.0, shared=0.0):
    """Rewards of 80 ensembles for 2000 texts in a unit of their own, and the truth."""
    truth, deviations = RANDOM.normal(size=2000), RANDOM.lognormal(size=2000)
    errors = np.sqrt(1 - shared) * noise((80, 2000)) + np.sqrt(shared) * RANDOM.normal(size=(80, 1))
    return 3 + 2 * truth + deviations * (errors + bias * RANDOM.normal(size=2000)), truth


def test_assumption_of_independent_unbiased_gaussian_errors_that_hold():
    found = assumption_tests(*retrained(RANDOM.standard_normal), seed=0)
    assert found["independent"].value == pytest.approx(1, abs=0.08)
    assert found["unbiased"].value == pytest.approx(0.05, abs=0.02)
    assert found["gaussian"].value == pytest.approx(0.05, abs=0.02)
    assert [one.count for one in found.values()] == [1000, 2000, 2000]


def test_each_part_of_the_assumption_is_seen_to_fail():
    dependent, truth = retrained(RANDOM.standard_normal, shared=0.5)
    value = assumption_tests(dependent, truth, seed=0)["independent"].value
    assert value == pytest.approx(0.5 / np.sqrt(2 / (np.pi * 79)), rel=0.25)  # over E|r|, nearly
    biased = assumption_tests(*retrained(RANDOM.standard_normal, bias=1.0), seed=0)
    expected = 2 * norm.sf(1.96 / np.sqrt(1 + 80))  # a mean error N(0, 1 + 1 / 80), tested as N(0, 1 / 80)
    assert biased["unbiased"].value == pytest.approx(expected, abs=0.04)
    assert biased["independent"].value == pytest.approx(1, abs=0.08)
    skewed = assumption_tests(*retrained(lambda size: RANDOM.exponential(size=size) - 1), seed=0)
    assert skewed["gaussian"].value > 0.99 and skewed["independent"].value == pytest.approx(1, abs=0.08)


def test_two_texts_by_hand_and_without_a_truth():
    rewards = RANDOM.normal(size=(6, 2))
    found = assumption_tests(np.column_stack([rewards, np.ones(6), rewards[:, ::-1]]), None, seed=1)
    by_chance = np.abs([pearsonr(*RANDOM.normal(size=(2, 6))).statistic for _ in range(4000)]).mean()
    correlations = {1.0, abs(np.corrcoef(rewards.T)[0, 1])}
    assert set(found) == {"independent", "gaussian"} and found["gaussian"].count == 4
    told = 2 * found["independent"].value * by_chance  # the sum over two pairs of texts
    sums = [one + other for one in correlations for other in correlations]
    assert min(abs(told - one) for one in sums) < 0.05


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
