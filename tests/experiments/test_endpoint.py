"""What notebook 04's protocol asks, on policies whose variances and gains are known."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm, ttest_1samp

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import endpoint
from vaalign_lib.experiments.comparisons import Comparisons, policies_of
from vaalign_lib.experiments.conditions import JUDGE_ROW, PLACEBO, Condition, group, plan

COUNT, RESAMPLES = 300, 400
GAINS = {"vanilla": 0.5, "variance_aware": 0.6, PLACEBO: 0.4}
BY_TRAINING = {"vanilla": 0.2, "variance_aware": 0.08, PLACEBO: 0.3}  # variances of gold
BY_JUDGE = {"vanilla": 0.3, "variance_aware": 0.12, PLACEBO: 0.3}  # what a judge of its own adds
ERROR = 0.1  # of an evaluation
SLOPE = -0.5  # of the variance of what a policy writes on its gold


def made(runs, seed=0, count=COUNT):
    """Return made-up policies: shared ones vary by training, independent ones by the judge as well."""
    tables = []
    for run in runs:
        random = np.random.default_rng([seed, *map(ord, run.name)])
        if run.objective == "reference":
            values, error = random.normal(0, 0.05, count), 0.05
        else:
            judge = BY_JUDGE[run.objective] if run.protocol == "independent" else 0
            true = random.normal(GAINS[run.objective], np.sqrt(BY_TRAINING[run.objective] + judge), count)
            values, error = true + random.normal(0, ERROR, count), ERROR
        table = {"policy": range(count), "gold": values, "gold_error": error, "true_reward": 7 * values}
        table |= {
            "true_reward_error": 7 * error,
            "variance": 2 + SLOPE * values + random.normal(0, 0.3, count),
        }
        table["kl"] = 2.0 + (run.protocol == "independent") + np.arange(count) / count
        tables.append(pd.DataFrame(table | {"run": run.name, **asdict(run)}))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def comparisons():
    policies = made(plan(["primary", "matched_kl", "shared_worlds"]))
    return Comparisons(policies, seed=3, resamples=RESAMPLES)


def of(comparisons, world, objective):
    """Return the policies of one stack of the endpoint."""
    (aware,) = (one for one in group("primary") if (one.world, one.objective) == (world, "variance_aware"))
    run = {"vanilla": aware.vanilla, "reference": aware.start}.get(
        objective, replace(aware, objective=objective)
    )
    return policies_of(comparisons.policies, run)


# --- the primary endpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", [PLACEBO, "vanilla"])
def test_every_world_is_compared_as_by_hand(comparisons, rival):
    table = endpoint.by_world(comparisons, rival).set_index("world")
    assert table.index.tolist() == [0, 1, 2, 3]
    for world, line in table.iterrows():
        start = of(comparisons, world, "reference")["gold"].to_numpy()
        relative, means = [], []
        for name, method in (("rival", rival), ("aware", "variance_aware")):
            policies = of(comparisons, world, method)
            values, errors = policies["gold"].to_numpy(), policies["gold_error"].to_numpy()
            variance = np.sum((values - values.mean()) ** 2) / (COUNT - 1) - np.mean(errors**2)
            gain = values.mean() - start.mean()
            error = np.sqrt(values.var(ddof=1) / COUNT + start.var(ddof=1) / COUNT)
            assert line[f"variance_{name}"] == pytest.approx(variance)
            assert line[f"gain_{name}"] == pytest.approx(gain)
            assert line[f"gain_{name}_error"] == pytest.approx(error)
            relative.append(variance / gain**2)
            means.append(values)
        assert line["log_ratio"] == pytest.approx(np.log(relative[0] / relative[1]))
        assert line["log_variances"] == pytest.approx(np.log(line["variance_rival"] / line["variance_aware"]))
        difference = ttest_1samp(means[1] - means[0], 0)
        assert line["difference"] == pytest.approx(np.mean(means[1] - means[0]))
        ends = tuple(difference.confidence_interval(0.95))
        assert (line["difference_low"], line["difference_high"]) == pytest.approx(ends)


def test_the_truth_lies_in_the_intervals(comparisons):
    variances = {name: BY_TRAINING[name] + BY_JUDGE[name] for name in GAINS}
    for rival in (PLACEBO, "vanilla"):
        truth = np.log(variances[rival] / GAINS[rival] ** 2) - np.log(0.2 / 0.6**2)
        table = endpoint.by_world(comparisons, rival)
        assert ((table["log_ratio_low"] < truth) & (truth < table["log_ratio_high"])).sum() >= 3
        over = endpoint.over_worlds(table)
        assert over.low < truth < over.high and over.low > 0


def test_the_interval_in_one_world_is_a_bootstrap_over_pairs_of_policies(comparisons):
    line = endpoint.by_world(comparisons).set_index("world").loc[2]
    start = of(comparisons, 2, "reference")["gold"].mean()
    golds = [of(comparisons, 2, method)["gold"].to_numpy() for method in (PLACEBO, "variance_aware")]
    drawn = np.random.default_rng([3, 0, 2]).integers(COUNT, size=(RESAMPLES, COUNT))  # seed, repeat, world
    logs = []
    for rows in drawn:
        values = []
        for gold in (one[rows] for one in golds):
            variance = gold.var(ddof=1) * COUNT / (COUNT - 1) - ERROR**2
            values.append(np.log(variance / (gold.mean() - start) ** 2))
        logs.append(values[0] - values[1])
    ends = np.quantile(logs, [0.025, 0.975])
    assert (line["log_ratio_low"], line["log_ratio_high"]) == pytest.approx(tuple(ends))


def test_a_variance_that_drowns_in_noise_counts_as_a_hundredth():
    policies = made(plan(["primary"]), count=40)
    aware = policies["objective"] == "variance_aware"
    policies.loc[aware, "gold_error"] = 5.0
    comparisons = Comparisons(policies, resamples=50)
    table = endpoint.by_world(comparisons).set_index("world")
    total = of(comparisons, 1, "variance_aware")["gold"].var(ddof=1)
    assert table.loc[1, "variance_aware"] == pytest.approx(total / 100)
    assert np.isfinite(table["log_ratio_high"]).all()


def test_the_midpoint_is_compared_likewise(comparisons):
    """Here it is seven times gold: ratios stay, variances and gains do not."""
    gold, midpoint = (endpoint.by_world(one) for one in (comparisons, comparisons.by("true_reward")))
    np.testing.assert_allclose(midpoint["log_ratio"], gold["log_ratio"])
    np.testing.assert_allclose(midpoint["variance_aware"], 49 * gold["variance_aware"])
    np.testing.assert_allclose(midpoint["difference"], 7 * gold["difference"])


def test_worlds_count_where_all_three_methods_are_known(comparisons):
    (placebo,) = (one for one in group("primary") if (one.world, one.objective) == (2, PLACEBO))
    policies = comparisons.policies[comparisons.policies["run"] != placebo.name]
    fewer = Comparisons(policies, resamples=20)
    without_start = policies[policies["run"] != "qwen2-judge-b-reference-world-1"]
    assert list(endpoint.stacks(Comparisons(without_start))) == [0, 3]
    assert list(endpoint.stacks(fewer)) == [0, 1, 3]
    assert endpoint.by_world(fewer)["world"].tolist() == [0, 1, 3]


def table_of(logs, gains=(0.5, 0.5), errors=(0.1, 0.1)):
    table = pd.DataFrame({"world": range(len(logs)), "log_ratio": logs, "difference": np.negative(logs)})
    for name, gain, error in zip(("rival", "aware"), gains, errors, strict=True):
        table = table.assign(**{f"gain_{name}": gain, f"gain_{name}_error": error})
    return table


def test_the_interval_over_worlds_is_students():
    logs = np.array([0.2, 1.4, 0.9, 0.7])
    for column, values in (("log_ratio", logs), ("difference", -logs)):
        found = endpoint.over_worlds(table_of(logs), column)
        ends = ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.value, found.low, found.high) == pytest.approx((values.mean(), ends.low, ends.high))
        assert found.count == 4 and found.measurable
    with pytest.raises(ValueError, match="two worlds or more for an interval over worlds, got 1"):
        endpoint.over_worlds(table_of(logs[:1]))


@pytest.mark.parametrize(
    ("logs", "verdict"),
    [
        ([1.0, 1.2, 0.9, 1.1], "met"),
        ([0.02, 0.1, 0.05, -0.03], "not met"),  # holds 0, ends below ln 1.25
        ([-1.0, -1.2, -0.9, -1.1], "not met"),
        ([0.1, 0.3, 0.2, -0.1], "unclear"),  # holds 0 and ends above ln 1.25
        ([2.0, -1.0, 1.5, 0.5], "unclear"),
    ],
)
def test_the_verdict_is_the_protocols(logs, verdict):
    assert endpoint.verdict(table_of(logs)) == verdict


@pytest.mark.parametrize("logs", [[1.0, 1.2, 0.9, 1.1], [0.02, 0.1, 0.05, -0.03]])
@pytest.mark.parametrize("name", ["rival", "aware"])
def test_a_gain_within_two_standard_errors_of_0_decides_nothing(logs, name):
    table = table_of(logs)
    table.loc[2, f"gain_{name}"] = 0.19  # one world of four, the error being 0.1
    assert endpoint.verdict(table) == "unclear" and not endpoint.over_worlds(table).measurable
    assert endpoint.over_worlds(table, "difference").measurable  # a difference divides by no gain
    table.loc[2, f"gain_{name}"] = 0.21
    assert endpoint.verdict(table) != "unclear"


# --- what makes policies vary, what they write, risk on the way ---------------------------------------


def test_what_the_judge_makes_is_what_a_judge_for_every_policy_adds(comparisons):
    table = endpoint.made_by(comparisons)
    assert len(table) == 4 * 2 * 2
    for (world, method), rows in table.groupby(["world", "method"]):
        parts = rows.set_index("made_by")["variance"]
        own = Condition(*JUDGE_ROW, "variance_aware", "independent", "matched_kl", world=world)
        common = replace(own, protocol="shared")
        pair = (own, common) if method == "variance_aware" else (own.vanilla, common.vanilla)
        golds = [policies_of(comparisons.policies, one)["gold"] for one in pair]
        training = golds[1].var() - ERROR**2
        assert parts["training"] == pytest.approx(training)
        assert parts["judge"] == pytest.approx(golds[0].var() - ERROR**2 - training)
        assert rows[["kl_independent", "kl_shared"]].to_numpy() == pytest.approx(
            3.5 - np.eye(2)[[1, 1]], abs=0.01
        )
    truth = (
        table["method"].map(BY_TRAINING).where(table["made_by"] == "training", table["method"].map(BY_JUDGE))
    )
    assert ((table["variance_low"] < truth) & (truth < table["variance_high"])).sum() >= 14


def test_parts_are_of_worlds_with_both_protocols():
    known = made(plan(["primary", "matched_kl"]), count=20)
    assert endpoint.made_by(Comparisons(known, resamples=20))["world"].unique().tolist() == [0]
    only_own = made(plan(["primary"]), count=20)
    own = Comparisons(only_own, resamples=20)
    assert endpoint.made_by(own).empty


def test_a_placebo_knows_gold_as_the_variance_does_and_not_the_error():
    found = endpoint.known_by_weights(World(0), 0)
    assert found["variance and gold"] < 0
    assert found["placebo and gold"] == pytest.approx(found["variance and gold"], abs=0.1)
    assert abs(found["placebo and variance"]) < 0.12 and abs(found["placebo and bias"]) < 0.2
    assert 0.2 < abs(found["variance and bias"]) < 0.6


def test_what_policies_write_goes_with_gold(comparisons):
    policies, correlations = endpoint.written(comparisons)
    assert len(policies) == 4 * 3 * COUNT and len(correlations) == 4 * 3
    for _, line in correlations.iterrows():
        part = of(comparisons, line["world"], line["method"])
        r = np.corrcoef(part["variance"], part["gold"])[0, 1]
        half = norm.ppf(0.975) / np.sqrt(COUNT - 3)  # Fisher's
        ends = np.tanh(np.arctanh(r) + np.array([-half, half]))
        assert (line["correlation"], line["low"], line["high"]) == pytest.approx((r, *ends))
        assert line["high"] < 0
    nothing = endpoint.written(Comparisons(made([Condition(*JUDGE_ROW)], count=10), resamples=10))
    assert all(one.empty for one in nothing)


def test_risk_on_the_way_counts_policies_at_or_below_the_reference(comparisons):
    runs = [one for one in plan(["primary"]) if one.objective != "reference" and one.world in (0, 1)]
    looks = pd.concat(
        [made([run], seed).assign(step=step) for seed, step in ((1, 5), (2, 80)) for run in runs]
    )
    bar = of(comparisons, 0, "reference")["gold"].mean()
    looks.iloc[0, looks.columns.get_loc("gold")] = bar  # at the reference counts
    table = endpoint.on_the_way(looks, comparisons)
    assert table[["method", "step"]].to_numpy().tolist() == [
        [method, step] for method in ("vanilla", "variance_aware", PLACEBO) for step in (5, 80)
    ]
    for _, line in table.iterrows():
        chosen = (
            (looks["objective"] == line["method"]) & (looks["step"] == line["step"]) & (looks["world"] == 0)
        )
        gold = looks.loc[chosen, "gold"].to_numpy()
        below = sum(value <= bar for value in gold)
        ends = binomtest(below, COUNT).proportion_ci(0.95, method="exact")
        assert (line["risk"], line["risk_low"], line["risk_high"]) == pytest.approx((below / COUNT, *ends))
        assert line["kl"] == pytest.approx(looks.loc[chosen, "kl"].mean())
        assert line["gain"] == pytest.approx(gold.mean() - bar)
        assert line["gain_in_sds"] == pytest.approx((gold.mean() - bar) / gold.std(ddof=1))
    assert 0 < table["risk"].min() < table["risk"].max() < 1
    assert endpoint.on_the_way(looks[looks["world"] == 1], comparisons).empty
