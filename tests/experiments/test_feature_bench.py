"""The feature bench in the embedded world: its judges, its objectives, and the dose-response."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import feature_bench as bench
from vaalign_lib.figures.bench import dose_response, said
from vaalign_lib.profiles import FeatureBench, Study, load_profile
from vaalign_lib.rewards.base import Interval
from vaalign_lib.rewards.simulated_judge import PersistentJudges
from vaalign_lib.statistics.tests import mean
from vaalign_lib.store import RunStore
from vaalign_lib.theory.feature_bench import at_kl
from vaalign_lib.training.objectives import OBJECTIVES, Outcome

SMALL = {"prompts": 8, "responses": 24, "policies": 12}


@pytest.fixture(scope="module")
def texts():
    return bench.stored_texts(World(3), prompts=8, responses=24)


@pytest.fixture(scope="module")
def table():
    return bench.dose_response([0, 1, 2], rhos=(-1, 0, 1), **SMALL)


class OneInterval:
    """Answers every text with the same interval."""

    def judge(self, prompts, responses, policy):
        return Interval(np.tile([0.0, 1.0], (len(responses), 1)))


@pytest.mark.parametrize("noise", ["persistent", "fresh"])
def test_errors_have_the_texts_variance(texts, noise):
    errors = bench.judge_errors(texts, noise, np.random.default_rng(0), policies=3000)
    assert np.abs(errors).max() <= np.sqrt(3 * texts.variance.max())
    np.testing.assert_allclose(errors.var(0) / texts.variance, 1, atol=0.15)
    assert (errors.mean((1, 2)).std() > 0.1) == (
        noise == "persistent"
    )  # like texts err alike, or nothing does


def test_judges_are_as_persistent_as_those_of_the_policy_stacks(texts):
    """Correlations over judges between a text and all others, by both implementations."""
    count, flat = 4000, texts.features.reshape(-1, texts.features.shape[-1])[:20]
    errors = bench.judge_errors(texts, "persistent", np.random.default_rng(0), count).reshape(count, -1)[
        :, :20
    ]
    judges = PersistentJudges(
        OneInterval(), lambda prompts, responses: flat[[int(r) for r in responses]], seed=5
    )
    names = [str(k) for k in range(20)]
    theirs = [
        judges.judge(names, names, np.full(20, judge, dtype=np.int64)).quantiles for judge in range(count)
    ]
    found, expected = np.corrcoef(errors.T), np.corrcoef(np.array(theirs).T)
    np.testing.assert_allclose(found, expected, atol=0.2)  # both draw Fourier features
    assert np.abs(found - expected).mean() < 0.06 and found[0].min() < 0.4


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_those_of_training(texts, name):
    strength, beta = 0.6, 0.4
    random = np.random.default_rng(0)
    place = random.random(texts.gold.shape)
    half = np.sqrt(3 * texts.variance)
    interval = Interval(
        np.stack([texts.consensus - half, texts.consensus + half], -1).reshape(-1, 2), place.ravel()
    )
    seen = [interval.sample(place.ravel()), interval.variance(), interval.worst()]
    soft = interval.soft_worst(np.full(place.size, strength))
    outcome = Outcome(*(torch.tensor(one) for one in (*seen, soft)))
    beta_of, strength_of = (torch.tensor(one, dtype=torch.float64) for one in (beta, strength))
    shaped = OBJECTIVES[name](outcome, beta_of, strength_of)
    found = bench.objective(name, texts.variance, texts.consensus, strength)
    errors = (2 * place - 1) * half
    score = texts.consensus - found.cost + found.trust * errors - found.stated * beta * found.weights
    np.testing.assert_allclose(np.broadcast_to(score, place.shape).ravel(), shaped.score, atol=1e-9)
    np.testing.assert_allclose(np.broadcast_to(found.weights, place.shape).ravel(), shaped.weight, atol=1e-9)


def test_a_linear_bench_reaches_a_kl(texts):
    linear = bench.bench_of(texts, "persistent", np.random.default_rng(0), policies=6, linear=True)
    assert linear.features is not None and linear.features.shape[-1] <= 10
    assert at_kl(linear, bench.objective("vanilla", texts.variance, texts.consensus), 0.2).kl.mean() == (
        pytest.approx(0.2, rel=0.01)
    )


def test_the_table_is_tidy_and_pooled_over_worlds(table):
    assert len(table) == 3 * 2 * 5 and not table.drop(columns="rho").isna().any().any()
    assert np.allclose(table["kl"], bench.TARGET, rtol=0.01)
    assert (table.loc[table["rho"] == 0, "log_ratio"] == 0).all()
    one = table[(table["noise"] == "fresh") & (table["rho"] == 1)]
    zero = table[(table["noise"] == "fresh") & (table["rho"] == 0)]
    np.testing.assert_allclose(one["log_ratio"], np.log(one["signal"].to_numpy() / zero["signal"].to_numpy()))
    means = bench.pooled(table).set_index(["noise", "weights", "rho"])
    expected = mean(one["log_ratio"])
    row = means.loc[("fresh", "correlated", 1.0)]
    assert row["ratio_low"] == pytest.approx(np.exp(expected.low)) and row["worlds"] == 3


def test_parts_of_the_effect_add_up(table):
    parts = bench.explained(table).set_index(["noise", "part"])["log_ratio"]
    for noise in ("fresh", "persistent"):
        assert parts[noise, "whole"] == pytest.approx(parts[noise][["unequal", "gold", "errors"]].sum())


def test_a_bench_is_a_function_of_its_world(table):
    again = bench.dose_response([1], rhos=(-1, 0, 1), **SMALL)
    pd.testing.assert_frame_equal(again, table[table["world"] == 1].reset_index(drop=True))


def test_worlds_are_kept_published_and_taken(tmp_path, monkeypatch):
    profile = load_profile("smoke")
    sizes = FeatureBench(worlds=2, **SMALL)
    study = Study(RunStore(tmp_path / "store"), profile.model_copy(update={"bench": sizes}), 5)
    computed = bench.worlds_table(study, 1, published=tmp_path)
    free = bench.dose_response([5, 6], **SMALL)
    shown = computed[~computed["linear"]].reset_index(drop=True)[list(free)]
    pd.testing.assert_frame_equal(shown, free)
    assert set(computed["world"]) == {5, 6} and computed["linear"].sum() == 2 * 2 * 5
    computed.drop(columns="origin").to_parquet(tmp_path / f"{bench.PUBLISHED}.parquet")
    monkeypatch.setattr(bench, "run_jobs", lambda jobs, *_: pytest.fail("computed again"))
    taken = bench.worlds_table(study, 1, True, tmp_path)
    assert set(taken["origin"]) == {"published"} and taken["gain"].equals(computed["gain"])
    monkeypatch.setattr(
        bench, "run_jobs", lambda jobs, *_: dict.fromkeys(jobs, computed.drop(columns="origin"))
    )
    other = replace(
        study, profile=profile.model_copy(update={"bench": sizes.model_copy(update={"prompts": 9})})
    )
    assert set(bench.worlds_table(other, 1, True, tmp_path)["origin"]) == {"computed"}


def test_the_figure_says_what_the_table_holds(table):
    pooled = bench.pooled(table)
    figure = dose_response(table, pooled)
    assert figure.get_suptitle().replace("\n", " ") == said(pooled)
    ends = pd.DataFrame(
        [
            {"noise": noise, "weights": "correlated", "rho": rho, "ratio": ratio}
            for noise, ratio in (("persistent", 2.0), ("fresh", 1.0))
            for rho in (-1, 1)
        ]
    ).assign(ratio_low=lambda rows: rows["ratio"] - 0.5, ratio_high=lambda rows: rows["ratio"] + 0.5)
    assert said(ends).count("higher") == 2 and said(ends).count("not shown to differ") == 2
    falls = ends.assign(ratio=0.5, ratio_low=0.3, ratio_high=0.8)
    assert said(falls).count("lower") == 4
