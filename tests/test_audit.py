"""The check of the printed statistics against independent computations."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from vaalign_lib import audit
from vaalign_lib.published import printed_value
from vaalign_lib.statistics import two_proportions


def test_there_are_the_seven_rows():
    assert len(audit.rows()) == 7 and audit.rows()[0] == "gpt2-ensemble"


def test_ranges_over_rounding_are_those_of_random_numbers_that_round_alike():
    random = np.random.default_rng(0)
    table = audit.audit().set_index(["item", "row", "quantity"])
    row = "qwen-gemini-2.0-flash"
    a = random.uniform(0.085, 0.095, 20_000)
    b = random.uniform(0.015, 0.025, 20_000)
    means = random.uniform(32.115, 32.125, 20_000), random.uniform(32.125, 32.135, 20_000)
    t = np.abs(means[1] - means[0]) / np.sqrt((a + b) / 80)
    risks = random.uniform(0.385, 0.395, 2000), random.uniform(0.155, 0.165, 2000)
    p = [two_proportions(80 * x, 80, 80 * y, 80).p for x, y in zip(*risks, strict=True)]
    for item, quantity, sampled in (
        ("Table 1", "F", a / b),
        ("Table 2", "|t|", t),
        ("Table 3", "p", np.array(p)),
    ):
        line = table.loc[(item, row, quantity)]
        assert line["low"] <= sampled.min() and sampled.max() <= line["high"]
        slack = 0.1 * (line["high"] - line["low"])
        assert sampled.min() - line["low"] < slack and line["high"] - sampled.max() < slack


def test_what_is_found_of_the_printed_statistics():
    """By hand: quotients, tables of F and t, z = (p1 - p2) / sqrt(p (1 - p) / 40)."""
    table = audit.audit().set_index(["item", "row", "quantity"])
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


def test_a_wrong_print_would_be_found(monkeypatch):
    changed = audit.published().copy()
    changed.loc["table1.gpt2-ensemble.variance_ratio_f", "printed"] = "7.33"
    changed.loc["table3.qwen-deepseek-v3.p_value", "printed"] = "0.237"
    monkeypatch.setattr(audit, "published", lambda: changed)
    monkeypatch.setattr("vaalign_lib.published.published", lambda: changed)
    table = audit.audit().set_index(["item", "row", "quantity"])["consistent"]
    assert not table[("Table 1", "gpt2-ensemble", "F")]
    assert table[("Table 3", "qwen-deepseek-v3", "p")]


def test_risks_as_counts():
    assert audit.counts_of("table3.gpt2-ensemble.risk_variance_aware")["half up"] == [4]
    seven = audit.counts_of("table3.mistral-gemini-2.0-flash.risk_variance_aware")
    assert seven == {"half up": [], "half even": [], "half down": [6]}  # 6 / 80 = 0.075
    table = audit.risks_as_counts()
    assert len(table) == 11 and (table[["half up", "half even", "half down"]] == "none").any().all()


def test_the_error_of_an_implied_reference_by_simulation():
    random, z = np.random.default_rng(1), -0.8
    returns = random.normal(0, 2, size=(20_000, 80))
    share = np.clip((returns <= 2 * z).mean(axis=1), 1 / 160, None)
    implied = returns.mean(axis=1) + returns.std(axis=1, ddof=1) * norm.ppf(share)
    assert audit.implied_error(4, norm.cdf(z)) == pytest.approx(implied.std(), rel=0.05)


def test_the_trend_over_ranges_by_simulation():
    random, found = np.random.default_rng(2), audit.range_trend()
    x = np.log(audit.RANGES)
    logs = np.log([printed_value(f"table4.range-{top}.variance_ratio_f") for top in audit.RANGES])
    assert found.value == pytest.approx(np.polyfit(x, logs, 1)[0])
    drawn = random.normal(size=(2, 4000, 4, 80)).var(axis=-1, ddof=1)
    slopes = np.polyfit(x, np.log(drawn[0] / drawn[1]).T, 1)[0]
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * slopes.std(), rel=0.05)


def test_degrees_of_freedom_of_a_critical_value():
    assert audit.equal_degrees(audit.f_test(1, 80, 1, 80).critical) == pytest.approx(79)


def test_adam_moves_no_weight_further_than_the_bound():
    learning_rate, random = 1e-3, np.random.default_rng(3)
    weight = torch.zeros(500, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    for step in range(50):  # mostly nothing, then all at once: the worst case
        scale = 1e-8 if step < 49 else 1.0
        weight.grad = torch.tensor(scale * random.normal(size=500), dtype=torch.float32)
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() <= audit.adam_bound(learning_rate, 1) * (1 + 1e-5)


def test_half_the_spacing_of_bfloat16():
    one = torch.tensor(0.02, dtype=torch.bfloat16)
    above = torch.nextafter(one, torch.tensor(1.0, dtype=torch.bfloat16))
    assert audit.half_spacing(0.02) == float(above - one) / 2
