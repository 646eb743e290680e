"""The figures of notebook 04's protocol draw, and their headlines say what their tables do."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy.stats import t

from tests.experiments.test_endpoint import made
from vaalign_lib.experiments import endpoint as analysis
from vaalign_lib.experiments.comparisons import Comparisons
from vaalign_lib.experiments.conditions import PLACEBO, plan
from vaalign_lib.figures import endpoint as figures
from vaalign_lib.figures import style


@pytest.fixture(scope="module")
def comparisons():
    return Comparisons(made(plan(["primary", "matched_kl", "shared_worlds"]), count=40), resamples=100)


def headline(figure):
    return " ".join(figure.get_suptitle().split()).replace("- ", "-")  # lines end after hyphens too


def drawn(figure, folder):
    """Check that something is drawn; return the headline."""
    figure.savefig(folder / "figure.png")
    assert plt.imread(folder / "figure.png")[..., :3].std() > 0.05
    return headline(figure)


def marks(axes):
    """Return the places of all marks with intervals, bar by bar."""
    return [np.asarray(one.lines[0].get_xydata(), dtype=float) for one in axes.containers if len(one.lines)]


def test_the_endpoint_by_world(comparisons, tmp_path):
    rivals = {"placebo : variance-aware": PLACEBO, "vanilla : variance-aware": "vanilla"}
    tables = {title: analysis.by_world(comparisons, rival) for title, rival in rivals.items()}
    pooled = {title: analysis.over_worlds(table) for title, table in tables.items()}
    figure = figures.endpoint(tables, pooled)
    told = drawn(figure, tmp_path)
    for title, table in tables.items():
        ends = np.exp([pooled[title].low, pooled[title].high])
        geometric = np.prod(np.exp(table["log_ratio"])) ** (1 / 4)
        assert f"{title}: {geometric:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]" in told
    places = [one[:, 0] for one in marks(figure.axes[0])]
    for k, (title, table) in enumerate(tables.items()):
        np.testing.assert_allclose(places[2 * k], np.exp(table["log_ratio"]))
        np.testing.assert_allclose(places[2 * k + 1], [np.exp(pooled[title].value)])
    left, right = figure.axes[0].get_xlim()
    for table in tables.values():  # no interval leaves the panel
        assert left < np.exp(table["log_ratio_low"].min()) and np.exp(table["log_ratio_high"].max()) < right


def test_what_judges_make(comparisons, tmp_path):
    table = analysis.made_by(comparisons)
    figure = figures.made_by(table)
    told = drawn(figure, tmp_path)
    for part in ("the judge", "training"):
        rows = (
            table[table["made_by"] == part.split()[-1]].set_index(["world", "method"])["variance"].unstack()
        )
        lows = table[(table["made_by"] == part.split()[-1]) & (table["method"] == "variance_aware")]
        assert lows["variance_low"].mean() > 0
        logs = np.log(rows["vanilla"] / rows["variance_aware"])
        ends = np.exp(t.interval(0.95, 3, logs.mean(), logs.std(ddof=1) / 2))
        interval = " to ".join(map(style.times, ends))
        assert f"by {part} {style.times(np.exp(logs.mean()))} times ({interval})" in told
    assert "worlds: 4" in told
    heights = [bar.get_height() for axes in figure.axes for bar in axes.patches]
    np.testing.assert_allclose(np.sort(heights), np.sort(table["variance"]))
    nothing = table.assign(variance_low=table["variance_low"].where(table["made_by"] == "training", -0.1))
    told = headline(figures.made_by(nothing))
    assert "made by the judge not determinable" in told and "by training not" not in told
    assert re.search(
        r"by training [\d.]+ times \(worlds: 1;", headline(figures.made_by(table[table["world"] == 1]))
    )


def test_what_policies_write(comparisons, tmp_path):
    policies, correlations = analysis.written(comparisons)
    figure = figures.written(policies, correlations)
    told = drawn(figure, tmp_path)
    assert told.startswith("Policies that write what is disputed have less gold")
    for method, word in (("vanilla", "vanilla"), ("variance_aware", "variance-aware"), (PLACEBO, "placebo")):
        mean = correlations.loc[correlations["method"] == method, "correlation"].mean()
        assert f"{mean:.2f} ({word})" in told
    turned = correlations.assign(correlation=-correlations["correlation"])
    assert headline(figures.written(policies, turned)).startswith(
        "Gold and the variance of what policies write"
    )
    dots = sum(len(one.get_offsets()) for axes in figure.axes for one in axes.collections)
    assert dots == len(policies)


def test_risk_on_the_way(tmp_path):
    rows = [
        (method, step, 0.1 * step, risk, risk - 0.05, risk + 0.05)
        for method, risks in (
            ("vanilla", (0.5, 0.4, 0.1)),
            ("variance_aware", (0.45, 0.1, 0.07)),
            (PLACEBO, (0.8, 0.6, 0.3)),
        )
        for step, risk in zip((5, 20, 80), risks, strict=True)
    ]
    columns = ["method", "step", "gain_in_sds", "risk", "risk_low", "risk_high"]
    figure = figures.on_the_way(pd.DataFrame(rows, columns=columns))
    told = drawn(figure, tmp_path)
    assert "after 20 steps" in told
    assert {"40% (vanilla)", "10% (variance-aware)"} <= set(re.findall(r"\d+% \([^)]*\)", told))
    risks = np.concatenate([one[:, 1] for one in marks(figure.axes[1])])
    assert sorted(risks) == sorted(row[3] for row in rows)


def test_controllers(tmp_path):
    def curve(last):
        steps = np.arange(1.0, 6)
        ratio = 0.5 + 0 * steps
        ends = {"log_ratio_low": ratio - 0.1, "log_ratio_high": ratio + 0.1}
        return pd.DataFrame({"step": steps, "coefficient": last * steps / 5, "log_ratio": ratio, **ends})

    curves = {
        "wind-up": {"vanilla": curve(40.0), "variance_aware": curve(7.0)},
        "held": {"vanilla": curve(0.3), "variance_aware": curve(1.25)},
    }
    figure = figures.controllers(curves, 0.7)
    assert "wind-up 40; held 1.25" in drawn(figure, tmp_path)
    below = figure.axes[2:]
    assert all(any(set(line.get_ydata()) == {0.7} for line in axes.lines) for axes in below)


def test_strengths(tmp_path):
    table = pd.DataFrame(
        {
            "strength": [30.0, 8.0, 0.5, 30.0, 0.4],
            "ratio": [6.0, 3.0, 1.2, 2.0, 0.9],
            "ratio_low": [4.0, 2.0, 1.0, 1.5, 0.5],
            "ratio_high": [8.0, 4.0, 1.5, 2.5, 1.4],
            "floored": [0.0, 0.0, 0.3, 0.0, 0.0],
            "range": [100, 50, 10, 100, 10],
            "regime": ["fixed", "fixed", "fixed", "held", "held"],
        }
    )
    figure = figures.strengths(table)
    told = drawn(figure, tmp_path)
    assert "Penalties 0.4 to 30 times vanilla's: in 4 of 5 comparisons" in told
    axes = figure.axes[0]
    faces = {one.get_label(): one.lines[0].get_markerfacecolor() for one in axes.containers}
    assert [name for name, face in faces.items() if face == "white"] == ["fixed: not determinable"]
    lines = [np.asarray(one.lines[0].get_ydata(), dtype=float) for one in axes.containers]
    assert [np.isnan(line).sum() for line in lines] == [1, 0, 0]  # no line through what is not determinable
    low, high = axes.get_ylim()
    assert low < table["ratio_low"].min() and table["ratio_high"].max() < high
    assert low < min(axes.get_yticks()) and max(axes.get_yticks()) < high
