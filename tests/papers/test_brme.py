"""What follows from the numbers printed in arXiv 2409.15360."""

import numpy as np
import pytest

from vaalign_lib.papers import brme
from vaalign_lib.papers.printed import published


def test_table_3_is_the_mean_relative_change_of_the_15_accuracies():
    table = brme.mean_improvements()
    one = table[(table["steps"] == 800) & (table["lambda"] == 0.4)].iloc[0]
    cells = brme.results("800").drop(index="eq-bench")
    assert one["value"] == pytest.approx((cells["0.4"] / cells["baseline"] - 1).mean(), abs=1e-6)
    assert table["consistent"].all() and (table["low"] < table["value"]).all()


def test_a_mistyped_cell_is_found(monkeypatch):
    changed = published().copy()
    changed.loc["brme.table2.gsm8k.lambda-0.4", "printed"] = "0.3264"
    monkeypatch.setattr("vaalign_lib.papers.printed.published", lambda: changed)
    found = brme.mean_improvements()
    assert not found[(found["steps"] == 800) & (found["lambda"] == 0.4)]["consistent"].item()


def test_printed_counts():
    assert len(brme.benchmarks()) == 16
    assert brme.min_wins() == 12
    best = brme.best_of("200")
    assert best.loc["0.4"].tolist() == [3, 11] and best.loc["0.6", "best"] == 9
    assert brme.differing_baselines() == ["eq-bench"]
    low, high = brme.long_run_advantage()
    assert low < 0.0242 < high < 0.035


def test_the_sign_test_is_the_binomial_one():
    above, below, p = brme.sign_test()
    assert (above, below) == (13, 1)
    assert p == pytest.approx(2 * (1 + 14) / 2**14)


def test_totals_need_weights_that_serve_both_models(monkeypatch):
    assert brme.totals_follow()
    changed = published().copy()
    changed.loc["brme.table5.tradition-rm.total", "printed"] = "76.0"  # above what the other total leaves
    monkeypatch.setattr("vaalign_lib.papers.printed.published", lambda: changed)
    assert not brme.totals_follow()


def test_pairs_needed_are_those_of_a_normal_test():
    size = brme.pairs_needed()
    error = np.sqrt((0.756 * 0.244 + 0.745 * 0.255) / size)
    assert 0.011 / error == pytest.approx(1.96, abs=1e-3)


def test_deviations_fit_the_ends_and_means():
    table = brme.sources()
    assert len(table) == 5 and (table["std"] < table["allowed"]).all()


def test_no_whole_number_of_209_is_four_and_a_half_percent():
    assert brme.whole_counts("brme.appendixA.consistent", 209) == [146, 147]
    assert brme.whole_counts("brme.appendixA.opposite", 209) == []
    rates = brme.agreement_rates().set_index("rate")
    assert rates.loc["opposite_gb", "counts"] == [9]  # the opposite judgments are all among these samples
    assert (rates["value_low"] < rates["printed"]).all() and (rates["printed"] < rates["value_high"]).all()


def test_the_selection_by_brute_force():
    """Every way to divide the 85 examples into the five ways in which three groups can agree."""
    found = set()
    for c in range(86):
        for a in range(86 - c):
            if round(100 * (c + a) / 85) != 64:
                continue
            for b in range(86 - c - a):
                if round(100 * (c + b) / 85) != 44:
                    continue
                for f in range(86 - c - a - b):
                    if round(100 * (b + f) / 85) == 9:
                        found.add(a + b + f)
    selected = brme.selected()
    assert (selected.low, selected.high) == (min(found) / 85, max(found) / 85)
