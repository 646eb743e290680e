"""The check of the printed statistics against independent computations."""

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from vaalign_lib.experiments.conditions import METHODS
from vaalign_lib.papers import recomputed
from vaalign_lib.papers.printed import printed_range, printed_value
from vaalign_lib.statistics.tests import f_test


def test_there_are_the_seven_rows():
    assert len(recomputed.rows()) == 7 and recomputed.rows()[0] == "gpt2-ensemble"


def drawn(key, random, count=2000):
    return random.uniform(*printed_range(key), count)


def test_ranges_over_rounding_are_those_of_random_numbers_that_round_alike():
    random = np.random.default_rng(0)
    table = recomputed.audit().set_index(["item", "row", "quantity"])
    implied = recomputed.implied_references().set_index("row")
    for row in recomputed.rows():
        a, b = (drawn(f"table1.{row}.variance_{name}", random) for name in METHODS)
        means = [drawn(f"table2.{row}.mean_{name}", random) for name in METHODS]
        risks = [drawn(f"table3.{row}.risk_{name}", random) for name in METHODS]
        error = np.sqrt((a + b) / 80)
        degrees = 79 * (a + b) ** 2 / (a**2 + b**2)
        pooled = sum(risks) / 2
        z = (risks[0] - risks[1]) / np.sqrt(pooled * (1 - pooled) / 40)
        sampled = {
            ("Table 1", "F"): a / b,
            ("Table 2", "|t|"): np.abs(means[1] - means[0]) / error,
            ("Table 2", "critical t"): t.ppf(0.975, degrees),
            ("Table 3", "p"): norm.sf(z),
        }
        for (item, quantity), values in sampled.items():
            line = table.loc[(item, row, quantity)]
            assert line["low"] <= values.min() and values.max() <= line["high"], (row, quantity)
            slack = 0.35 * (line["high"] - line["low"])
            assert values.min() - line["low"] < slack and line["high"] - values.max() < slack
        references = [
            mean + np.sqrt(spread) * norm.ppf(risk)
            for mean, spread, risk in zip(means, (a, b), risks, strict=True)
        ]
        errors = [
            np.sqrt(v / 80 * (r * (1 - r) / norm.pdf(norm.ppf(r)) ** 2 - 1 - norm.ppf(r) ** 2 / 2))
            for v, r in zip((a, b), risks, strict=True)
        ]
        gap = (references[1] - references[0]) / np.hypot(*errors)
        assert implied.loc[row, "z_low"] <= gap.min() and gap.max() <= implied.loc[row, "z_high"]


def test_variances_of_which_either_may_be_larger_are_refused(monkeypatch):
    changed = recomputed.published().copy()
    changed.loc["table1.gpt2-ensemble.variance_vanilla", "printed"] = "0.0121"
    monkeypatch.setattr("vaalign_lib.papers.printed.published", lambda: changed)
    with pytest.raises(ValueError, match="either variance may be the larger one"):
        recomputed.audit()


def test_what_is_found_of_the_printed_statistics():
    """By hand: quotients, tables of F and t, z = (p1 - p2) / sqrt(p (1 - p) / 40)."""
    table = recomputed.audit().set_index(["item", "row", "quantity"])
    by_kind = table.groupby(["item", "quantity"])["consistent"].agg(["sum", "size"])
    assert tuple(by_kind.loc[("Table 1", "F")]) == (7, 7)
    assert tuple(by_kind.loc[("Table 2", "|t|")]) == (7, 7)
    assert tuple(by_kind.loc[("Table 2", "critical t")]) == (6, 7)
    assert tuple(by_kind.loc[("Table 3", "p")]) == (4, 7)
    assert tuple(by_kind.loc[("Table 4", "ratio")]) == (3, 4)
    assert not table.loc[("Table 1", "", "critical F"), "consistent"]
    assert table.loc[("Table 1", "", "critical F"), "low"] == pytest.approx(1.5593, abs=1e-4)
    line = table.loc[("Table 3", "qwen-deepseek-v3", "p")]
    z = 0.05 / np.sqrt(0.265 * 0.735 / 40)
    assert line["low"] < norm.sf(z) < line["high"] and line["off_by"] < 0.25
    odd = table.loc[("Table 4", "range-50", "ratio")]
    assert (odd["low"], odd["high"]) == pytest.approx((0.21745 / 0.0585, 0.21755 / 0.0575))


def printing(monkeypatch, **values):
    """Let the paper print other numbers."""
    changed = recomputed.published().copy()
    for key, text in values.items():
        changed.loc[key, "printed"] = text
    monkeypatch.setattr(recomputed, "published", lambda: changed)
    monkeypatch.setattr("vaalign_lib.papers.printed.published", lambda: changed)


def test_a_wrong_print_would_be_found(monkeypatch):
    printing(
        monkeypatch,
        **{"table1.gpt2-ensemble.variance_ratio_f": "7.33", "table3.qwen-deepseek-v3.p_value": "0.237"},
    )
    table = recomputed.audit().set_index(["item", "row", "quantity"])["consistent"]
    assert not table[("Table 1", "gpt2-ensemble", "F")]
    assert table[("Table 3", "qwen-deepseek-v3", "p")]


def test_consistent_numbers_would_be_found_consistent(monkeypatch):
    printing(
        monkeypatch,
        **{
            "table1.f_critical": "1.559",
            "table2.qwen-gemini-2.0-flash.t_critical": "1.98",
            "table3.mistral-gemini-1.5-flash.p_value": "0.187",
            "table3.qwen-gemini-1.5-flash.p_value": "0.237",
            "table3.qwen-deepseek-v3.p_value": "0.237",
            "table3.mistral-gemini-2.0-flash.risk_variance_aware": "0.08",
            "table3.mistral-gemini-2.0-flash.p_value": "5e-6",
            "table4.range-50.variance_ratio_f": "3.75",
        },
    )
    table = recomputed.audit()
    assert table.loc[table["quantity"] != recomputed.WIDTHS, "consistent"].all()
    assert (recomputed.risks_as_counts()["half up"] != "none").all()


def test_what_notebook_05_says_of_the_printed_numbers():
    """Its prose is about these; were they to change, it would have to be read again."""
    variances, means, risks = recomputed.variance_tests(), recomputed.mean_tests(), recomputed.risk_tests()
    assert recomputed.equal_degrees(printed_value("table1.f_critical")) == pytest.approx(68, abs=0.5)
    assert (variances["p_holm"] < 0.05).all() and (means["margin_in_gains"] > 0.1).all()
    names = ["p", "p_holm", "p_worst_holm", "boschloo_holm"]
    assert (risks[names] < 0.05).sum().tolist() == [4, 4, 3, 3]
    same = risks.set_index("row").loc[["qwen-gemini-1.5-flash", "qwen-deepseek-v3"]]
    assert same["vanilla"].nunique() == same["variance_aware"].nunique() == 1
    assert same["p_printed"].nunique() == 2
    first = printed_value("table4.range-100.variance_vanilla")
    assert printed_value("table4.range-50.variance_vanilla") / (first / 4) == pytest.approx(10.1, abs=0.05)
    for name in METHODS:
        low, high = printed_range(f"table4.range-100.variance_{name}")
        row = printed_range(f"table1.qwen-gemini-2.0-flash.variance_{name}")
        assert low <= row[1] and row[0] <= high
    rate = printed_value("table12.learning_rate")
    assert recomputed.adam_bound(rate, 1) < recomputed.half_spacing(recomputed.TYPICAL_WEIGHT)


def test_risks_as_counts():
    assert recomputed.counts_of("table3.gpt2-ensemble.risk_variance_aware")["half up"] == [4]
    seven = recomputed.counts_of("table3.mistral-gemini-2.0-flash.risk_variance_aware")
    # 5 / 80 = 0.0625, 6 / 80 = 0.075
    assert seven == {"half up": [], "half even": [], "half down": [6], "down": [6], "up": [5]}
    table = recomputed.risks_as_counts()
    assert len(table) == 11 and (table[list(recomputed.ROUNDINGS)] == "none").any().all()


def test_the_error_of_an_implied_reference_by_simulation():
    random, z = np.random.default_rng(1), -0.8
    returns = random.normal(0, 2, size=(20_000, 80))
    share = np.clip((returns <= 2 * z).mean(axis=1), 1 / 160, None)
    implied = returns.mean(axis=1) + returns.std(axis=1, ddof=1) * norm.ppf(share)
    assert recomputed.implied_error(4, norm.cdf(z)) == pytest.approx(implied.std(), rel=0.05)


def test_the_trend_over_ranges_by_simulation():
    random, found = np.random.default_rng(2), recomputed.range_trend()
    x = np.log(recomputed.RANGES)
    logs = np.log([printed_value(f"table4.range-{top}.variance_ratio_f") for top in recomputed.RANGES])
    assert found.value == pytest.approx(np.polyfit(x, logs, 1)[0])
    drawn = random.normal(size=(2, 4000, 4, 80)).var(axis=-1, ddof=1)
    slopes = np.polyfit(x, np.log(drawn[0] / drawn[1]).T, 1)[0]
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * slopes.std(), rel=0.05)


def test_degrees_of_freedom_of_a_critical_value():
    assert recomputed.equal_degrees(f_test(1, 80, 1, 80).critical) == pytest.approx(79)


@pytest.mark.parametrize("gradients", ["growing", "spike", "noise"])
def test_adams_largest_step(gradients):
    rate, steps, random = 1e-3, 3000, np.random.default_rng(3)
    k = np.arange(steps)[::-1]
    values = {
        "growing": (0.9 / 0.999) ** k,
        "spike": np.where(k == 0, 1.0, 1e-8),
        "noise": random.normal(size=steps),
    }[gradients]
    weight = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    optimizer = torch.optim.Adam([weight], lr=rate, eps=1e-300)
    largest = 0.0
    for value in values:
        weight.grad = torch.full_like(weight, float(value))
        before = float(weight.detach())
        optimizer.step()
        largest = max(largest, abs(float(weight.detach()) - before))
    bound = recomputed.adam_bound(rate, 1)
    assert largest <= bound
    if gradients == "growing":
        assert largest > 0.9 * bound  # and it is attained


def test_half_the_spacing_of_bfloat16():
    one = torch.tensor(0.02, dtype=torch.bfloat16)
    above = torch.nextafter(one, torch.tensor(1.0, dtype=torch.bfloat16))
    assert recomputed.half_spacing(0.02) == float(above - one) / 2
