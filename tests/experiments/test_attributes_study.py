"""The experiment of notebook 06: its measures against plain loops, and its small runs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import attributes as study
from vaalign_lib.experiments.conditions import group, plan
from vaalign_lib.experiments.policies import source_of, train_run
from vaalign_lib.figures import attributes as figures
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.rewards.attributes import AttributeHeads
from vaalign_lib.rewards.classifier import read
from vaalign_lib.statistics.tests import rank_correlations
from vaalign_lib.store import RunStore

SIZES = load_profile("smoke").attributes


def test_rank_correlations_are_spearmans():
    random = np.random.default_rng(0)
    first, second = random.standard_normal((3, 4, 30)), random.integers(0, 5, (4, 30)).astype(float)
    found = rank_correlations(first, second)
    for s in range(3):
        for k in range(4):
            assert found[s, k] == pytest.approx(spearmanr(first[s, k], second[k]).statistic)


def test_auroc_is_mann_whitneys_with_ties():
    random = np.random.default_rng(1)
    inside, outside = random.integers(0, 6, (2, 40)), random.integers(2, 8, (2, 25))
    for row in range(2):
        exact = mannwhitneyu(outside[row], inside[row]).statistic / (40 * 25)
        assert study.auroc(inside, outside)[row] == pytest.approx(exact)


def test_what_certainty_is_worth_at_equal_margin():
    """Accuracy that follows the margin alone gains nothing at equal margin; one that follows doubt does."""
    random = np.random.default_rng(2)
    margin = random.random((1, 40_000))
    doubt = 1 - margin + 0.2 * random.random(margin.shape)
    by_margin = random.random(margin.shape) < 0.5 + 0.5 * margin
    assert study._certain_half(by_margin, doubt, margin, 1)[0] > 0.1
    assert abs(study._certain_half(by_margin, doubt, margin, 50)[0]) < 0.01
    own = random.random(margin.shape)
    by_doubt = random.random(margin.shape) < 1 - 0.5 * own
    assert study._certain_half(by_doubt, own, margin, 10)[0] == pytest.approx(0.125, abs=0.01)


def test_members_share_a_seeds_texts_and_bootstrap_ones_draw_again():
    alike, own = (study.rows_of(SIZES, bootstrap, 0) for bootstrap in (False, True))
    assert alike.shape == own.shape == (SIZES.seeds * SIZES.members, SIZES.texts_each * SIZES.raters)
    for s in range(SIZES.seeds):
        block = alike[s * SIZES.members : (s + 1) * SIZES.members]
        assert (block == block[0]).all() and len(block[0].unique()) == block.shape[1]
        drawn = own[s * SIZES.members]
        assert set(drawn.tolist()) <= set(block[0].tolist()) and len(drawn.unique()) < 0.75 * block.shape[1]
    assert not torch.equal(alike[0].sort()[0], alike[-1].sort()[0])


def test_a_urme_is_read_member_by_member():
    random = torch.Generator().manual_seed(0)
    heads = AttributeHeads(0.1 * torch.randn(6, 5, 2, 4, generator=random), torch.zeros(6, 5, 2))
    features = torch.randn(7, 4, generator=random)
    found, told = study.uncertainty_of(heads, features, seeds=2), heads.ratings(features)
    rewards = (told.means * study.PRIOR).sum(-1)
    variances = (told.variances * study.PRIOR**2).sum(-1)
    for s in range(2):
        own = rewards[3 * s : 3 * s + 3]
        assert np.allclose(found.reward[s], own.mean(0))
        assert np.allclose(found.measures["Eq. 7"][s], own.max(0).values - own.min(0).values, atol=1e-6)
        assert np.allclose(found.measures["URM"][s], told.variances[3 * s].sum(-1))
        assert np.allclose(found.measures["aleatoric"][s], variances[3 * s : 3 * s + 3].mean(0))
        assert np.allclose(found.measures["epistemic"][s], own.var(0, correction=0), atol=1e-6)


@pytest.fixture(scope="module")
def people():
    """Ratings whose variance follows a feature, in two domains."""
    random = np.random.default_rng(3)
    features = random.standard_normal((1500, 6))
    said = features[:, :1] + np.exp(0.7 * features[:, 1:2]) * random.standard_normal((1500, 14))
    said[::3, 12:] = np.nan
    return features, said, np.array(["films", "tweets", "editorials"])[np.arange(1500) % 3]


def test_people_who_are_held_out(people):
    settings = SIZES.training.model_copy(update={"epochs": 4.0})
    table = study.people_table(*people, settings, seed=0)
    means = table[table["domain"] == "all"].groupby("kind")["rank"].mean()
    assert means["mle"] > 0.75 and means["mle"] > means["regression"] + 0.2
    assert table.loc[table["kind"] == "mle", "ratio"].mean() == pytest.approx(1, abs=0.25)
    assert len(table) == study.FOLDS * 2 * 4
    figures.people(table)


def test_the_best_of_texts_by_people_who_were_not_heard(people, monkeypatch):
    monkeypatch.setattr(study, "GROUP", 16)
    settings = SIZES.training.model_copy(update={"epochs": 4.0})
    table = study.people_best_of_n(*people, settings, members=3, seed=0)
    wide = table.groupby(["n", "chooser"])["gain"].mean().unstack()
    assert np.allclose(wide.loc[1], 0) and (wide.loc[16] > wide.loc[4]).all() and (wide.loc[4] > 0.5).all()
    assert (table["gain"] <= table["most"] + 1e-9).all() and set(wide) == {"deterministic", "URM", "URME"}
    divided = study.PeopleApart.of(people[1], 0)
    for k, rows in enumerate(divided.rows.numpy()):
        assert not (divided.fold[rows // study.HEARD] == k).any()
    first = np.sort(np.concatenate([divided.heard[0], divided.apart[0]]))
    assert set(first) <= set(people[1][0]) and len(set(first)) == study.HEARD + study.APART
    figures.best_of_n(table, "points", "folds")


def test_people_of_other_domains(people):
    features, said, domains = people
    moved = features + 3 * (domains == "tweets")[:, None]
    table = study.people_outside(moved, said, domains, np.arange(1500.0) % 7, SIZES, seed=0)
    baseline = table[table["measure"] == "Mahalanobis"].set_index("texts")["auroc"]
    assert baseline["tweets"] > 0.99 and baseline["editorials"] == pytest.approx(0.5, abs=0.06)
    figures.outside(table)


def test_the_bench_compares_weights_of_equal_values():
    table = study.bench_table(SIZES, [0])
    assert set(table["weights"]) == {"placebo", "none", "aleatoric", "epistemic", "total", "errors"}
    by_name = table.set_index("weights")
    assert (
        by_name.loc["errors", "rank"] == pytest.approx(1, abs=1e-3)
        and by_name.loc["placebo", "log_ratio"] == 0
    )
    assert np.allclose(table["kl"], 0.5, rtol=2e-3)
    ratio = by_name["signal"] / by_name.loc["placebo", "signal"]
    assert np.allclose(np.log(ratio), by_name["log_ratio"])
    figures.bench_weights(pd.concat([table, table.assign(world=1, log_ratio=table["log_ratio"] + 0.1)]))


def test_policies_are_trained_by_a_urme_of_their_own(tmp_path):
    """Two policies, two steps: their rewards and weights are those of their own three members."""
    profile = load_profile("smoke")
    few = profile.policies.model_copy(update={"count": 2})
    small = profile.attributes.model_copy(update={"texts": 120, "texts_each": 100, "test_texts": 20})
    run = Study(RunStore(tmp_path), profile.model_copy(update={"policies": few, "attributes": small}), 0)
    pair = group("urme")
    assert [one.vanilla for one in pair] == [pair[0].vanilla] * 2 and plan(["urme"])[0] == pair[0].vanilla
    sources = [source_of(run, one) for one in pair]
    world, random = World(0), np.random.default_rng(0)
    asked, answers = world.corpus(6, random)
    policy = np.array([0, 1, 0, 1, 1, 0])
    told = [one.judge(asked, answers, policy) for one in sources]
    assert np.array_equal(told[0].scores, told[1].scores)
    heads = sources[0].heads
    features = sources[0].model, sources[0].tokenizer, asked, answers, sources[0].max_length
    ratings = heads.ratings(read(*features)[0])
    rewards = (ratings.means * study.PRIOR).sum(-1).numpy()
    spread = (ratings.variances * study.PRIOR**2).sum(-1).numpy()
    for row, one in enumerate(policy):
        members = slice(3 * one, 3 * one + 3)
        own, variances = rewards[members, row], spread[members, row]
        np.testing.assert_allclose(told[0].scores[row], own, rtol=1e-5)
        np.testing.assert_allclose(told[0].weight()[row], variances.mean(), rtol=1e-5)
        np.testing.assert_allclose(told[1].weight()[row], own.var(), rtol=1e-3, atol=1e-9)
    folder = train_run(run, replace(pair[1], regime="equal_mean_penalty"))
    policies = pd.read_parquet(folder / "policies.parquet")
    assert len(policies) == 2 and np.isfinite(policies[["gold", "kl", "true_reward"]]).all().all()
