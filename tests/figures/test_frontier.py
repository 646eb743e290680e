"""Figures of notebook 08 say what their tables hold."""

import numpy as np
import pandas as pd

from vaalign_lib.figures import frontier as figures
from vaalign_lib.statistics.tests import Estimate


def told(name, value, spread=0.1):
    return {name: value, f"{name}_low": value - spread, f"{name}_high": value + spread}


def test_open_marks_are_those_that_are_beaten():
    rows = [(bench, n, method) for bench in figures.BENCHES for n in (2, 4) for method in ("vanilla", "uwo")]
    means = pd.DataFrame(
        [
            {"bench": bench, "n": n, "method": method}
            | told("gain", n + (method == "uwo"))
            | told("deviation", 0.5 * n)
            for bench, n, method in rows
        ]
    )
    shares = means[["bench", "n", "method"]].assign(on_frontier=means["method"] == "uwo")
    figure = figures.frontier(means, shares, "a title")
    axes = figure.axes[0]
    faces = {
        line.get_markerfacecolor()
        for line in axes.lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 1
    }
    assert figure.get_suptitle() == "a title" and len(figure.axes) == 3
    assert "white" in faces and [text.get_text() for text in figure.legends[0].texts] == ["vanilla", "uwo"]


def test_sources_are_named_beside_their_points_without_overlap():
    doses = pd.DataFrame(
        [
            {"bench": bench, "method": "correlated", "dose": dose, "correlation": dose}
            | told("log_ratio", dose)
            for bench in figures.BENCHES
            for dose in (-1.0, 0.0, 1.0)
        ]
    )
    names = [f"source {k}" for k in range(5)]
    sources = pd.DataFrame({"bench": "reward models", "method": names, "correlation": 0.1, "log_ratio": 0.01})
    ends = dict.fromkeys(figures.BENCHES, Estimate(0.0, -0.1, 0.1, 3))
    ends["judges"] = Estimate(np.nan, np.nan, np.nan, 3)
    figure = figures.dose_axis(doses, sources, ends, "a title")
    texts = [text for text in figure.axes[2].texts if text.get_text() in names]
    heights = sorted(text.get_position()[1] for text in texts)
    assert len(texts) == 5 and np.diff(heights).min() > 0.05
    assert len(figure.axes[0].patches) == 0 and len(figure.axes[1].patches) == 1


def test_methods_come_in_one_order_in_all_panels():
    rows = [("judges", "uwo", 0.1), ("judges", "placebo", 0.3), ("reward models", "uwo", 0.9)]
    table = pd.DataFrame(
        [
            {"bench": bench, "method": method} | told("gain", value) | told("cvar_10", value)
            for bench, method, value in rows
        ]
    )
    benches = {"judges": "judges", "reward models": "learned"}
    first, second = figures.against_vanilla(table, "a title", benches).axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["uwo", "placebo"]
    places = [np.asarray(axes.containers[0].lines[0].get_ydata(), dtype=float) for axes in (first, second)]
    assert places[0][0] == places[1][0] > places[0][1]


def test_where_another_choice_regrets_less_is_said():
    regrets = {bench: {"matched KL": 0.5, "target risk": 0.1} for bench in figures.BENCHES}
    regrets["unreliable judges"] = {"matched KL": 0.2, "target risk": 0.3}
    table = pd.DataFrame(
        [
            {"bench": bench, "method": method, "choice": choice}
            | told("regret_gain", 0.1)
            | told("regret_cvar", value)
            for bench, choices in regrets.items()
            for choice, value in choices.items()
            for method in ("vanilla", "variance-aware")
        ]
    )
    title = " ".join(figures.choices(table, "Least: target risk").get_suptitle().replace("-\n", "-").split())
    less = "matched KL 0.200, target risk 0.300"
    where = "; ".join(f"unreliable judges, {method}, {less}" for method in ("vanilla", "variance-aware"))
    assert title == f"Least: target risk. Not everywhere: {where}"
