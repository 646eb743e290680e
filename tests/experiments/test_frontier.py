"""Notebook 08: cases, methods against the objectives of training, and the rules that its tables follow."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import feature_bench, frontier, frontier_tables
from vaalign_lib.experiments.feature_bench import stored_texts
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.rewards.base import Members
from vaalign_lib.statistics.tests import mean, rank_correlations
from vaalign_lib.store import RunStore
from vaalign_lib.theory.feature_bench import probabilities
from vaalign_lib.training.objectives import OBJECTIVES, Outcome

SIZES = {"prompts": 8, "responses": 24, "policies": 8, "pairs": 64, "members": 4, "many": 5, "widths": [32]}


@pytest.fixture(scope="module")
def texts():
    return stored_texts(World(3), 8, 24)


@pytest.fixture(scope="module")
def models(texts):
    world = World(3)
    source = frontier.labelled(world, 64)
    fitted = frontier.learned(source, texts, 8, world.rng("models"))
    heads = fitted.members(4, world.rng("heads"))
    return source, fitted, heads, frontier.case_of_models(texts, source, fitted, heads, world.rng("case"))


@pytest.fixture(scope="module")
def table():
    return pd.concat([frontier.world_table(seed, **SIZES) for seed in (0, 1, 2)], ignore_index=True)


def test_a_models_methods_are_the_objectives_of_training(models):
    _, fitted, heads, case = models
    scores = np.einsum("nmd,xd->nxm", heads, fitted.features)
    centred = scores.mean(-1).reshape(case.rewards.shape)
    centred = centred - centred.mean(-1, keepdims=True)
    for policy in range(2):
        scale = float(centred[policy].std())
        members = Members(scores[policy])
        common = float((centred - 0).std())  # of all policies, in which the certainty equivalent is taken
        strength = frontier.STRENGTHS["effective"] / common
        location = scores[policy].mean(-1).reshape(8, 24).mean(-1).repeat(24)
        units = [
            (one - location) / scale
            for one in (
                members.sample(np.zeros(192)),
                members.worst(),
                members.soft_worst(np.full(192, strength)),
            )
        ]
        variance = members.variance() / members.variance().mean()
        outcome = Outcome(*(torch.as_tensor(one) for one in (units[0], variance, units[1], units[2])))
        for mine, name, by in (
            ("vanilla", "vanilla", 1.0),
            ("variance-aware", "variance_aware", 1.0),
            ("uwo", "uwo", frontier.STRENGTHS["uwo"]),
            ("worst case", "worst_case", 1.0),
            ("reward-robust", "reward_robust", frontier.STRENGTHS["reward-robust"]),
            ("effective", "effective", 1.0),
        ):
            rewards, weights, _ = case.objectives()[mine]
            shaped = OBJECTIVES[name](outcome, torch.tensor(0.0), torch.tensor(by, dtype=torch.float64))
            np.testing.assert_allclose(rewards[policy].ravel(), shaped.score, atol=1e-9)
            if mine == "variance-aware":
                expected = np.maximum(shaped.weight.numpy(), frontier.LEAST)
                np.testing.assert_allclose(weights[policy].ravel(), expected, atol=1e-9)


def test_judges_say_their_variance_and_the_placebo_has_its_values(texts):
    case = frontier.case_of_judges(texts, 8.0, np.random.default_rng(0), 200)
    assert np.abs(case.rewards.mean(-1)).max() < 1e-9 and case.rewards.std() == pytest.approx(1)
    known = frontier.mean_rank_correlation(case.variance, case.squared_errors)
    placebo = case.objectives()["placebo"][1]
    assert known > 0.3 and abs(frontier.mean_rank_correlation(placebo, case.squared_errors)) < 0.15
    np.testing.assert_allclose(np.sort(placebo[3].ravel()), np.sort(case.variance[3].ravel()))
    assert (case.worst < case.rewards).all() and (case.soft_worst < case.rewards).all()
    assert (case.worst < case.soft_worst).all()


def test_errors_are_residuals_and_correlations_are_scipys(texts):
    random = np.random.default_rng(1)
    rewards = 0.5 * texts.gold + random.standard_normal((3, 8, 24))
    squares = frontier.squared_errors(rewards, texts.gold)
    flat = [(one - one.mean(-1, keepdims=True)).ravel() for one in (rewards[1], texts.gold)]
    slope = np.polyfit(flat[1], flat[0], 1)[0]
    np.testing.assert_allclose(squares[1].ravel(), (flat[0] - slope * flat[1]) ** 2, atol=1e-9)
    expected = np.mean([spearmanr(texts.variance.ravel(), one.ravel())[0] for one in squares])
    assert frontier.mean_rank_correlation(texts.variance, squares) == pytest.approx(expected)


def test_stacks_have_their_kl_and_probabilities_their_gains(texts):
    case = frontier.case_of_judges(texts, 8.0, np.random.default_rng(0), 6)
    target = frontier.best_kl(24, 4)
    for method in ("vanilla", "variance-aware"):
        rewards, weights, stated = case.objectives()[method]
        stack = frontier.trained(case.gold, rewards, weights, stated, target)
        chances = probabilities(stack, rewards, weights)
        np.testing.assert_allclose(frontier.gained(chances, case.gold), stack.gains, atol=1e-6)
        assert (chances * np.log(24 * chances)).sum(-1).mean() == pytest.approx(target, rel=0.01)
    vanilla = frontier.trained(case.gold, case.rewards, 1.0, False, target)
    kept = frontier.filtered(case, target, vanilla)
    left = probabilities(kept, case.rewards, 1.0)
    count = round(24 * (1 - np.exp(-target / 2)))
    masked = case.variance.argsort(-1).argsort(-1) >= 24 - count
    left[masked] = 0
    left /= left.sum(-1, keepdims=True)
    np.testing.assert_allclose(frontier.gained(left, case.gold), kept.gains, atol=1e-6)
    assert kept.kl.mean() == pytest.approx(target, rel=0.01)


def test_best_of_n_is_what_drawing_gives(texts):
    case = frontier.case_of_judges(texts, 1.0, np.random.default_rng(0), 2)
    random = np.random.default_rng(2)
    drawn = random.random((20_000, 8, 24)).argsort(-1)[..., :4]  # four of a prompt's responses
    rewards = np.take_along_axis(np.broadcast_to(case.rewards[0], (20_000, 8, 24)), drawn, -1)
    chosen = np.take_along_axis(drawn, rewards.argmax(-1)[..., None], -1)[..., 0]
    gold = np.take_along_axis(case.gold, chosen.T, 1).mean() - case.gold.mean()
    assert frontier.best_of_n_gains(case, 4)[0] == pytest.approx(gold, abs=0.01)
    share = np.bincount(chosen[:, 0], minlength=24) / 20_000
    kl = (share[share > 0] * np.log(24 * share[share > 0])).sum()
    assert frontier.best_kl(24, 4) == pytest.approx(kl, abs=0.02)


def test_a_world_has_all_parts_at_equal_kl(table):
    assert set(table["part"]) == {"frontier", "dose", "source", "beta", "task", "width"}
    front = table[table["part"] == "frontier"]
    targets = front["n"].map(lambda n: frontier.best_kl(24, int(n)))
    np.testing.assert_allclose(front["kl"], targets, rtol=0.01)
    assert (front["regret"] >= front["gain"].max() * 0).all() and (front["cvar_10"] <= front["gain"]).all()
    methods = front.groupby("bench")["method"].nunique()
    assert methods.to_dict() == {"judges": 10, "unreliable judges": 10, "reward models": 13}
    doses = table[(table["part"] == "dose") & (table["method"] == "correlated")]
    known = doses.groupby(["bench", "dose"])["correlation"].mean().unstack("bench")
    assert known.apply(lambda one: one.is_monotonic_increasing).all()
    again = frontier.world_table(1, **SIZES)
    pd.testing.assert_frame_equal(again, table[table["world"] == 1].reset_index(drop=True))


def test_beta_is_chosen_as_said(table):
    beta = table[table["part"] == "beta"]
    assert (beta["regret_gain"].max() >= 0) and set(beta["choice"]) == {
        "matched KL", "adaptive", "validation", "validation, all policies", "target risk",
    }  # fmt: skip
    tested = np.array([[0.1, 0.2], [0.3, -0.1], [0.2, -0.5]])  # (betas, policies)
    validated = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    agreement = np.array([[0.1, 0.1], [0.1, 0.1], [0.1, -0.1]])
    kl = np.array([[0.2, 0.6], [0.6, 1.0], [1.2, 1.4]])
    chosen = {how: gains.tolist() for how, gains, _ in frontier._chosen(tested, validated, agreement, kl, 8)}
    assert chosen["matched KL"] == [0.3, -0.1] and chosen["adaptive"] == [0.3, 0.2]
    assert chosen["validation"] == [0.3, 0.2] and chosen["target risk"] == [0.3, -0.1]


def test_worlds_are_computed_or_as_published(monkeypatch, tmp_path):
    made = []

    def world(seed, **sizes):
        made.append(seed)
        return pd.DataFrame({"world": [seed], "gain": [seed / 10]})

    monkeypatch.setattr(feature_bench, "_kept", lambda store, name, compute, config, code: world(**config))
    monkeypatch.setattr(
        feature_bench, "run_jobs", lambda jobs, *_: {name: job() for name, job in jobs.items()}
    )
    profile = load_profile("smoke")
    some = profile.frontier.model_copy(update={"worlds": 4, "computed": 2})
    study = Study(RunStore(tmp_path / "store"), profile.model_copy(update={"frontier": some}), 7)
    first = frontier.worlds_table(study, 1, tmp_path)
    assert made == [7, 8, 9, 10] and set(first["origin"]) == {"computed"}
    first.assign(gain=first["gain"] + 1).drop(columns="origin").to_parquet(
        tmp_path / "frontier_worlds.parquet"
    )
    again = frontier.worlds_table(study, 1, tmp_path).set_index("world")
    assert made[4:] == [7, 8] and again["gain"].to_dict() == {7: 0.7, 8: 0.8, 9: 1.9, 10: 2.0}
    other = some.model_copy(update={"pairs": 100})
    frontier.worlds_table(replace(study, profile=profile.model_copy(update={"frontier": other})), 1, tmp_path)
    assert made[6:] == [7, 8, 9, 10]


# --- what is made of worlds ---------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_beats():
    gain, deviation = np.array([1.0, 2.0, 1.5, 2.0]), np.array([1.0, 2.0, 2.5, 2.0])
    assert frontier_tables.on_frontier(gain, deviation).tolist() == [True, True, False, True]


def rows(**columns):
    return pd.DataFrame({"world": np.tile(range(6), len(columns))}).assign(
        bench="b", n=4, method=np.repeat(list(columns), 6), gain=np.concatenate(list(columns.values()))
    )


def test_use_when_takes_the_cheapest_that_is_as_good():
    noise = np.array([0.1, -0.1, 0.2, -0.2, 0.1, -0.1])
    found = rows(vanilla=1 + noise, filtering=2 + 0 * noise, uwo=1.99 + noise)
    for criterion in ("signal", "risk", "cvar_10", "regret"):
        found[criterion] = found["gain"]
    told = frontier_tables.use_when(found.assign(deviation=1.0)).set_index("criterion")
    assert told.loc["gain", "best"] == "filtering" and told.loc["gain", "use"] == "uwo"
    assert told.loc["risk", "best"] == "vanilla" and told.loc["risk", "value"] == pytest.approx(1)


def test_differences_are_within_world_and_bench():
    found = rows(vanilla=np.arange(6.0), uwo=np.arange(6.0) ** 2, filtering=np.ones(6))
    both = pd.concat([found, found.assign(bench="c", gain=-found["gain"])]).sample(frac=1, random_state=0)
    less = frontier_tables.against(both, "vanilla", ["gain"]).set_index(["bench", "method", "world"])["gain"]
    assert len(less) == 24 and less["b", "uwo", 3] == 6 and less["c", "uwo", 3] == -6
    assert less["b", "filtering", 4] == -3


def test_means_leave_out_what_some_worlds_lack():
    found = rows(vanilla=np.arange(6.0), uwo=np.ones(6)).iloc[:-1]
    told = frontier_tables.means(found, ["bench", "method"], ["gain"])
    assert told["method"].tolist() == ["vanilla"] and told["gain"].tolist() == [2.5]
    assert told["gain_low"][0] == pytest.approx(mean(np.arange(6.0)).low)


def test_break_even_is_where_the_line_crosses():
    doses = np.linspace(-1, 1, 5)
    told = {"method": "correlated", "dose": doses, "correlation": 0.5 * doses}
    shifts = enumerate((0.1, 0.3, 0.2, 0.2))
    parts = [pd.DataFrame(told | {"world": world, "log_ratio": doses - one}) for world, one in shifts]
    found = frontier_tables.break_even(pd.concat(parts), seed=0)
    assert found.value == pytest.approx(0.1) and 0.05 <= found.low < found.value < found.high <= 0.15


def test_rank_correlations_are_scipys():
    random = np.random.default_rng(0)
    pair = random.standard_normal((2, 1, 7))
    assert rank_correlations(*pair)[0] == pytest.approx(spearmanr(*pair[:, 0])[0])


def test_the_tables_rules_run_on_worlds(table):
    front = table[table["part"] == "frontier"]
    shares = frontier_tables.frontier_shares(front, seed=0)
    assert shares.groupby(["bench", "n"])["on_frontier"].any().all() and shares["share"].between(0, 1).all()
    assert set(frontier_tables.use_when(front)["use"]) <= set(frontier_tables.NEEDS)
    ranking = frontier_tables.width_correlation(table[table["part"] == "width"], seed=0)
    assert -1 <= ranking.low <= ranking.high <= 1
