"""Tables and figures of notebook 04 on results whose truth is known."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.comparisons import (
    Comparisons,
    MissingRunError,
    brief,
    compared,
    in_words,
    interval_deviations,
    judged_in_ranges,
    policies_of,
    standardized_gap,
    with_widest_range,
    without_farthest,
)
from vaalign_lib.experiments.conditions import JUDGE_ROW, ROWS, Condition, group, plan, stretch_of
from vaalign_lib.figures import policies as figures
from vaalign_lib.papers.printed import RANGES
from vaalign_lib.statistics.returns import Ratio
from vaalign_lib.statistics.tests import Estimate

COUNT = 400


def results(runs, spread, shift=0.3, seed=0, count=COUNT):
    """Return made-up results: vanilla's training variance is spread(run), the others' 0.2."""
    random, tables = np.random.default_rng(seed), []
    for run in runs:
        variance = {"vanilla": spread(run), "reference": 0.0}.get(run.objective, 0.2)
        error = np.full(count, 0.1)
        centre = 0.0 if run.objective == "reference" else shift
        values = centre + random.normal(0, np.sqrt(variance), count) + random.normal(0, error)
        tables.append(
            pd.DataFrame(
                {
                    "policy": range(count),
                    "true_reward": values,
                    "true_reward_error": error,
                    "gold": values,
                    "gold_error": error,
                    "kl": random.normal(2, 0.1, count) * (run.objective != "reference"),
                    "log_ratio": 1.5,
                    "variance": 1.0,
                    "step_length": 0.01,
                    "length": 20.0,
                    "run": run.name,
                    **asdict(run),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def known():
    return results(plan(["rows", "independent", "primary"]), lambda run: 0.4)


def test_every_comparison_finds_its_vanilla_stack_and_reference(known):
    runs = compared(known)
    primary = [run for run in group("primary") if run.objective == "variance_aware"]  # and not the placebo
    assert runs == list(dict.fromkeys([*group("rows"), *group("independent"), *primary]))
    assert len(runs) == 7 + 2 + 4 - 1
    lacking = known[known["run"] != runs[-1].start.name]
    assert compared(lacking) == runs[:-1]
    table = Comparisons(known).table(runs)
    assert table["row"].tolist()[:7] == ["-".join(row) for row in ROWS]
    assert (table["ratio_low"] < table["ratio"]).all() and (table["ratio"] < table["ratio_high"]).all()
    assert ((table["ratio_low"] < 2) & (table["ratio_high"] > 2)).sum() >= 10
    np.testing.assert_allclose(table["variance_vanilla"], table["training_vanilla"] + table["noise_vanilla"])
    np.testing.assert_allclose(table["noise_aware"], 0.01)
    assert (table["p"] < 0.01).all() and (table["p_paired"] < 0.01).all()
    assert not table["floored"].any()
    assert (table["risk_vanilla"] > table["risk_aware"]).all()
    from scipy.stats import norm

    assert table["risk_vanilla"].mean() == pytest.approx(norm.cdf(-0.3 / 0.41**0.5), abs=0.02)


def test_pooled_estimates_find_the_truth(known):
    comparisons = Comparisons(known)
    runs = [run for run in compared(known) if run.protocol == "shared"]
    pooled, single = comparisons.mean_ratio(runs), comparisons.ratio(runs[0])
    assert pooled.low < 2 < pooled.high
    assert np.log(pooled.high / pooled.low) < 0.6 * np.log(single.high / single.low)
    gap = comparisons.risk_difference(runs)
    assert gap.low < 0.0685 < gap.high and gap.high - gap.low < 0.1


def test_an_estimate_does_not_depend_on_what_else_is_shown(known):
    runs = compared(known)
    comparisons = Comparisons(known)
    line = comparisons.table(runs[3:]).iloc[0]
    alone = comparisons.ratio(runs[3])
    assert (line["ratio_low"], line["ratio_high"]) == (alone.low, alone.high)


def test_rows_that_share_their_policies_are_drawn_again_together(known):
    """Two rows with the same returns are no better known than one."""
    copied = known.copy()
    first, second = compared(known)[:2]
    for mine, theirs in ((first, second), (first.vanilla, second.vanilla)):
        values = policies_of(known, mine)["gold"].to_numpy()
        copied.loc[copied["run"] == theirs.name, "gold"] = values
    comparisons = Comparisons(copied)
    one, both = comparisons.ratio(first), comparisons.mean_ratio([first, second])
    assert (both.low, both.high) == pytest.approx((one.low, one.high))


def test_policies_are_compared_by_gold_where_it_is_known(known):
    run = compared(known)[0]
    other = known.assign(true_reward=3 * known["gold"] ** 3, true_reward_error=0.0)
    by_gold = Comparisons(other)
    midpoint = by_gold.by("true_reward")
    assert (by_gold.outcome, midpoint.outcome) == ("gold", "true_reward")
    line = by_gold.table([run]).iloc[0]
    assert line["ratio"] == Comparisons(known).ratio(run).value != midpoint.ratio(run).value
    assert line["ratio_midpoint"] == midpoint.ratio(run).value
    assert line["midpoint_aware"] == pytest.approx(policies_of(other, run)["true_reward"].mean())
    unknown = other.assign(gold=other["gold"].where(other["policy"] > 0))
    assert Comparisons(unknown).outcome == "true_reward"


def test_worlds_are_drawn_again_each_on_their_own(known):
    comparisons = Comparisons(known, resamples=10)
    one, other = (run for run in group("primary")[::2][:2])
    assert (one.world, other.world) == (0, 1)
    assert (comparisons.rows(one) != comparisons.rows(other)).any()
    np.testing.assert_array_equal(comparisons.rows(one), comparisons.rows(one.vanilla))


def test_the_slope_over_ranges():
    known = results(plan(["printed_ranges"]), lambda run: 0.2 * (run.highest / 10) ** 0.5)
    runs = compared(known)
    assert [run.highest for run in runs] == list(RANGES)
    slope = Comparisons(known).range_slope(runs)
    assert slope.low < 0.5 < slope.high and slope.high - slope.low < 0.5


def test_the_farthest_policy_goes_from_both_stacks():
    known = results(plan(["ranges"]), lambda run: 0.2)
    runs = compared(known)
    far = (known["run"] == runs[1].name) & (known["policy"] == 17)
    known.loc[far, "gold"] = 99.0
    kept = without_farthest(known, runs, "gold")
    for run in (runs[1], runs[1].vanilla):
        assert 17 not in policies_of(kept, run)["policy"].tolist()
    assert len(kept) == len(known) - 2 * len(runs)


def test_missing_runs_are_named(known):
    with pytest.raises(MissingRunError, match="no results of the run qwen2-judge-b-vanilla-to-20"):
        policies_of(known, Condition(*JUDGE_ROW, highest=20))


def test_figures_show_every_policy_and_comparison(known):
    runs = compared(known)
    panels = {
        run.row: {
            "vanilla": policies_of(known, run.vanilla),
            "variance_aware": policies_of(known, run),
            "reference": policies_of(known, run.start),
        }
        for run in runs[:4]
    }
    figure = figures.return_distributions(
        panels, "gold", {name: Estimate(1.5, 1.1, 2.0, COUNT) for name in panels}
    )
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 4
    for axes in shown:
        assert [len(dots.get_offsets()) for dots in axes.collections if len(dots.get_offsets()) > 1] == [
            COUNT,
            COUNT,
        ]
    ranges = results(plan(["ranges"]), lambda run: 0.4)
    by_range = Comparisons(ranges).table(compared(ranges))
    assert figures.range_ratios(by_range, dict.fromkeys(RANGES, 2.0)).axes[0].lines
    figures.interval_deviations({"rescaled": {10: np.ones(3), 20: np.arange(3.0)}})
    plt.close("all")


def test_rescaled_judges_differ_only_in_scale_and_printed_widths_in_spread():
    world = World(0)
    assert standardized_gap(judged_in_ranges(world, "judge-b", "rescaled", 0, 200)) < 1e-9
    assert standardized_gap(judged_in_ranges(world, "judge-b", "printed", 0, 200)) > 0.1
    rescaled = interval_deviations(world, "judge-b", "rescaled", 0, 200)
    printed = interval_deviations(world, "judge-b", "printed", 0, 200)
    for top in RANGES:
        np.testing.assert_allclose(rescaled[top], rescaled[100])
        assert printed[top].std() / printed[100].std() == pytest.approx(
            stretch_of(Condition("", "judge-b", highest=top, widths="printed")), rel=0.1
        )


def test_printed_widths_begin_at_the_widest_range():
    groups = plan(["ranges", "printed_widths", "rows"])
    known = results([run for run in groups if (run.architecture, run.source) == JUDGE_ROW], lambda run: 0.4)
    table = with_widest_range(Comparisons(known).table(compared(known)))
    lines = table.groupby(["regime", "widths"])["range"].agg(sorted).to_dict()
    assert lines.pop(("equal_mean_penalty", "rescaled")) == [100]
    assert len(lines) == 5 and all(line == sorted(RANGES) for line in lines.values())


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.1, 2, "lower with"), (0.4, 0.9, "higher with"), (0.9, 1.2, "not shown to differ")],
)
def test_ratios_in_words(low, high, words):
    assert in_words(Estimate(np.sqrt(low * high), low, high, 80)).startswith(words)


def test_a_ratio_in_the_noise_is_not_determinable():
    lost = Ratio(2.0, 1.5, 2.5, 80, np.ones(3), 0.5)
    assert in_words(lost).startswith("not determinable (ratio 2.00, 95% interval 1.50 to 2.50): in 50%")


def test_tables_to_read_keep_methods_and_intervals_together(known):
    table = Comparisons(known).table(compared(known)[:2])
    text = brief(table, ["row", "kl", "ratio", "floored", "regime"]).iloc[0]
    line = table.iloc[0]
    assert text["kl"] == f"{line['kl_vanilla']:.3g} → {line['kl_aware']:.3g}"
    assert text["ratio"] == f"{line['ratio']:.2f} [{line['ratio_low']:.2f}, {line['ratio_high']:.2f}]"
    assert (text["row"], text["floored"], text["regime"]) == (line["row"], "0", "equal mean penalty")
    lost = brief(table.assign(floored=[0.0, 0.03]), ["ratio"])["ratio"]  # of two comparisons, one in noise
    assert lost[0] == text["ratio"] and lost[1].startswith("(") and lost[1].endswith("])")
