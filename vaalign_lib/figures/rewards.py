"""The figures of notebook 03: one function each, tidy data in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaalign_lib.figures import style
from vaalign_lib.statistics.arrays import Array

ONE, OTHER = style.SERIES[:2]


def world_disagreement(table: pd.DataFrame) -> Figure:
    """Annotators' variance against the gold reward in three settings, from a row per response and setting:
    `setting`, `gold`, `variance`, `correlation` (Spearman).
    """
    names = {
        "none": "regardless of quality",
        "poor": "most about poor responses",
        "good": "most about good ones",
    }
    told = []
    with style.canvas(7.4, 3.6, table["setting"].nunique(), sharey=True) as (figure, panels):
        for axes, (setting, rows) in zip(panels, table.groupby("setting", sort=False), strict=True):
            style.scatter_medians(axes, rows, "gold", "variance", 10, ONE)
            axes.set(yscale="log", ylim=(2e-3, 60), xlabel="gold reward, corpus SDs")
            axes.set_title(f"Disagreement\n{names[setting]}")
            style.note(axes, f"ρ = {rows['correlation'].iloc[0]:+.2f}, n = {len(rows)}")
            told.append(f"{rows['correlation'].iloc[0]:+.2f} ({names[setting]})")
        panels[0].set_ylabel("annotators' variance")
        found = f"Rank correlation of disagreement and gold reward: {', '.join(told)}."
        style.headline(figure, f"{found} Lines: medians of tenths.")
    return figure


def selection_gains(table: pd.DataFrame, method: str = "best of n") -> Figure:
    """Gold gained by choosing among the reference's responses, against KL, by category, from those rows of
    `vaalign_lib.policies.best_of_n.gains` that are of a method.
    """
    table = table[table["method"] == method]
    proxies = list(dict.fromkeys(table["proxy"]))
    categories = table.groupby("category", sort=False)
    with style.grid(len(categories), 2, 6.8, 2.6, sharex=True, sharey=True) as (figure, panels):
        for axes, (category, rows) in zip(panels, categories, strict=True):
            for k, proxy in enumerate(proxies):  # thinner and thinner, so that equal lines show below
                one = rows[rows["proxy"] == proxy]
                width, colour = 1.2 * 1.5 ** (len(proxies) - 1 - k), style.SERIES[k % len(style.SERIES)]
                axes.plot(one["kl"], one["gain"], color=colour, linewidth=width, label=proxy)
                axes.errorbar(one["kl"], one["gain"], 1.96 * one["error"], fmt="none", color=colour, lw=1)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xlabel="KL to the reference, nats", title=category, ylabel="gold gained,\ncorpus SDs")
            axes.label_outer()
        last = table.loc[table.groupby(["category", "proxy"])["kl"].idxmax()].groupby("proxy")["gain"].mean()
        gains = ", ".join(f"{name} {last[name]:.2f}" for name in proxies)
        style.headline(figure, f"{method.capitalize()} at the largest KL, mean gain: {gains}. Bars: 95%.")
        style.legend_outside(figure, panels[0], 2)
    return figure


def reward_model(log: pd.DataFrame, accuracy: pd.DataFrame, threshold: float) -> Figure:
    """Stage 1: its loss, which would stop training at the threshold, and how often it ranks a pair rightly:
    a row per `category` and judge, `against`, with `accuracy`, `low`, `high`.
    """
    names, judges = (list(dict.fromkeys(accuracy[column])) for column in ("category", "against"))
    with style.canvas(7.6, 3.9, 2) as (figure, (left, right)):
        left.plot(log["step"], log["loss"], color=ONE, marker="o", markersize=2.5)
        for height, text in ((np.log(2), "chance, ln 2"), (threshold, f"stop at {threshold:g}")):
            left.axhline(height, color=style.REFERENCE, linestyle=":", linewidth=1)
            style.label(left, log["step"].iloc[-1], height, text, style.REFERENCE, offset=(0, 7), ha="right")
        left.set(xlabel="step", ylabel="loss", title="One head on the whole model", ylim=(0.2, 0.8))
        places = style.lines_of(right, [name.replace("_", " ")[:18] for name in names])
        for k, judge in enumerate(judges):
            rows = accuracy[accuracy["against"] == judge]
            at = places[[names.index(name) for name in rows["category"]]] + 0.12 - 0.24 * k
            style.forest(right, rows, at, "accuracy", style.SERIES[k], fmt=style.MARKERS[k], label=judge)
        right.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        right.set(xlim=(0.4, 1), xlabel="pairs ranked rightly", title="Accuracy, 95% intervals")
        style.percent(right.xaxis)
        span = accuracy.groupby("against", sort=False)["accuracy"].agg(["min", "max"]).iterrows()
        told = "; ".join(f"{row['min']:.0%} to {row['max']:.0%} against {judge}" for judge, row in span)
        end = f"Loss at the end {log['loss'].iloc[-1]:.2f}."
        style.headline(figure, f"Pairs ranked rightly, by category: {told}. {end}")
        style.legend_outside(figure, right, len(judges))
    return figure


def figure_1(scores: pd.DataFrame, spread: float) -> Figure:
    """Figure 1: the scores of ten reward models for one prompt and its two responses, a row each: `model`,
    `chosen`, `rejected`; beside the standard deviation of the mean reward over all responses, the `spread`.
    """
    with style.canvas(6.4, 4.0) as (figure, (axes,)):
        axes.vlines(scores["model"], scores["rejected"], scores["chosen"], color="0.7", linewidth=2, zorder=1)
        for side, colour, mark in (("chosen", ONE, "o"), ("rejected", OTHER, "s")):
            values = scores[side]
            axes.axhline(values.mean(), color=colour, linewidth=1, linestyle="--", zorder=0)
            text = f"{side}: mean {values.mean():.2f}, SD {values.std(ddof=1):.2f}"
            axes.plot(scores["model"], values, mark, color=colour, markersize=7, label=text)
        axes.set(xlabel="reward model", ylabel="score", xticks=scores["model"])
        gap = scores["chosen"] - scores["rejected"]
        score = scores["chosen"].std(ddof=1)
        style.headline(
            figure,
            f"{(gap > 0).sum()} of {len(gap)} models prefer the chosen response; SD of its score over models "
            f"{score:.2f}, of the gap {gap.std(ddof=1):.2f}, of rewards over responses {spread:.2f}",
        )
        style.legend_outside(figure, axes, 2)
    return figure


def figure_8(table: pd.DataFrame, printed: str) -> Figure:
    """Figure 8: variances over ten models, of accepted responses (top) and of differences (bottom), from a
    row per pair: `category`, `accepted`, `difference`; above them what the paper printed.
    """
    categories = table.groupby("category", sort=False)
    count, medians = len(categories), categories["accepted"].median()
    with style.canvas(2.0 * count + 0.4, 4.9, count, 2) as (figure, panels):
        for k, (category, rows) in enumerate(categories):
            for axes, quantity, colour, name in (
                (panels[k], "accepted", ONE, "accepted response"),
                (panels[count + k], "difference", OTHER, "difference"),
            ):
                values, edges = rows[quantity], np.linspace(0, table[quantity].quantile(0.995), 31)
                axes.hist(values, bins=list(edges), color=colour)
                for value, line in ((values.median(), "-"), (values.mean(), ":")):
                    axes.axvline(value, color="black", linewidth=1.2, linestyle=line)
                style.note(axes, f"median {values.median():.3g}\nmean {values.mean():.3g}\nn = {len(values)}")
                axes.set(xlabel=f"variance,\n{name}", ylabel="" if k else "pairs")
                axes.xaxis.set_major_locator(MaxNLocator(3))
            panels[k].set_title(str(category))
        told = f"medians {medians.min():.3g} to {medians.max():.3g} (accepted)."
        style.headline(figure, f"Ten heads, the paper's recipe: {told}\n{printed}")
    return figure


def _lines(axes: Axes, table: pd.DataFrame, group: str, x: str, y: str, size: float) -> None:
    """Draw a line with marks for each group, in the order in which they come."""
    for k, (name, rows) in enumerate(table.groupby(group, sort=False)):
        look: Any = {"color": style.SERIES[k], "markersize": size, "label": name}
        axes.plot(rows[x], rows[y], f"{style.MARKERS[k]}-", **look)


def variance_steps(table: pd.DataFrame) -> Figure:
    """Variance between heads against training steps, from a row per `recipe` and `step`: `accepted`,
    `difference` (median variances), `loss` (mean over pairs and heads).
    """
    table = table.assign(step=table["step"].clip(lower=0.7))  # none before the first, on a logarithmic axis
    with style.canvas(7.6, 3.8, 3) as (figure, panels):
        for axes, column, title, scale in (
            (panels[0], "accepted", "median variance,\naccepted", "log"),
            (panels[1], "difference", "median variance,\ndifference", "log"),
            (panels[2], "loss", "loss of\nthe heads", "linear"),
        ):
            _lines(axes, table, "recipe", "step", column, 4)
            axes.set(xscale="log", xlabel="step", title=title, yscale=scale)
        ends_of = table.groupby("recipe", sort=False)["difference"].agg(["first", "last"])
        left = ", ".join(f"{row['last'] / row['first']:.2g} ({name})" for name, row in ends_of.iterrows())
        style.headline(figure, f"Share of the difference's median variance left after training: {left}")
        style.legend_outside(figure, panels[0], 2)
    return figure


def disagreement_kinds(table: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """Draw columns, by name and title, of the kinds of disagreement side by side: a row per `kind`, with
    `<column>_low` and `<column>_high` where there is an interval.
    """
    with style.canvas(8.0, 0.36 * len(table) + 1.7, len(columns), sharey=True) as (figure, panels):
        places = style.lines_of(panels[0], table["kind"].tolist())
        for axes, (column, title) in zip(panels, columns.items(), strict=True):
            style.forest(axes, table.drop(columns=["low", "high"], errors="ignore"), places, column, ONE)
            axes.set_title(title.replace(" / ", " /\n").replace(") / ", ") /\n"))
            axes.grid(axis="y", visible=False)
            if (table[column] > 0).all() and table[column].max() > 20 * table[column].min():
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(3))
            if column.startswith("rank"):
                axes.axvline(0, color="black", linewidth=0.8)
        ends = [table.loc[table["relative_variance"].agg(end)] for end in ("idxmin", "idxmax")]
        told = " to ".join(f"{row['relative_variance']:.2g} ({row['kind']})" for row in ends)
        ranked = f"{table['accuracy'].min():.0%} to {table['accuracy'].max():.0%}. Lines: 95% intervals."
        style.headline(
            figure, f"Variance between heads: {told} of the reward's; pairs ranked rightly {ranked}"
        )
    return figure


def calibration(bins: pd.DataFrame, covered: pd.DataFrame) -> Figure:
    """Errors beside predicted deviations, and coverage, before and after the temperature: rows of
    `error_by_deviation` and `coverage` with `against` and `repaired`.
    """
    looks = ((False, ONE, "as predicted"), (True, OTHER, "times one temperature"))
    questions, told = list(dict.fromkeys(bins["against"])), []
    with style.grid(2 * len(questions), 2, 6.8, 2.7) as (figure, panels):
        for question, left, right in zip(questions, panels[::2], panels[1::2], strict=True):
            mine, shares = bins[bins["against"] == question], covered[covered["against"] == question]
            line = mine[["predicted", "error"]].to_numpy()
            for axes, ends in ((left, [0.8 * line.min(), 1.2 * line.max()]), (right, [0.4, 1])):
                axes.plot(ends, ends, color=style.REFERENCE, linewidth=0.8, linestyle="--")
            for repaired, colour, name in looks:
                rows = mine[mine["repaired"] == repaired]
                look: Any = {"fmt": "o-", "color": colour, "markersize": 4, "label": name}
                left.errorbar(rows["predicted"], rows["error"], style.spans(rows, "error"), **look)
                rows = shares[shares["repaired"] == repaired]
                style.band(right, rows, "nominal", "actual", colour, marker="o", markersize=4)
            style.plain_log(left, "xy")
            nominal = shares["nominal"].max()
            widest = shares[shares["nominal"] == nominal].set_index("repaired")["actual"]
            left.set(xlabel="predicted SD", ylabel="error, RMS", title=f"Errors against {question}")
            right.set(xlabel="nominal coverage", ylabel="actual coverage", ylim=(0, 1.02))
            right.set_title(f"{nominal:.0%} intervals cover {widest[False]:.0%}, then {widest[True]:.0%}")
            told.append(f"{widest[False]:.0%} of {question}, {widest[True]:.0%} after one temperature")
        style.headline(figure, f"Intervals of {nominal:.0%} cover {'; '.join(told)}")
        style.legend_outside(figure, panels[0], 2)
    return figure


def ensemble_spread(table: pd.DataFrame, correlation: str) -> Figure:
    """Draw what ensembles say about themselves beside how independent ones differ, a row per response:
    `within` (variance of single members), `between` (of the mean over ensembles), `members`; with their
    correlation in words.
    """
    members = int(table["members"].iloc[0])
    with style.canvas(5.4, 4.6) as (figure, (axes,)):
        axes.scatter(table["within"], table["between"], s=6, alpha=0.4, color=ONE, lw=0, rasterized=True)
        line = np.array([table["within"].min(), table["within"].max()])
        for share, text in ((1, "equal"), (1 / members, f"1/{members}: independent noise")):
            axes.plot(line, line * share, color=style.REFERENCE, linewidth=1, linestyle="--")
            style.label(axes, line[1], line[1] * share, text, style.REFERENCE, offset=(-4, -14), ha="right")
        axes.set(xlabel="variance of members, within an ensemble", xscale="log")
        axes.set(ylabel="variance of the mean, between ensembles", yscale="log")
        style.note(axes, f"n = {len(table)} responses", "upper left")
        ratio = (table["between"] / table["within"]).median()
        style.headline(figure, f"Means vary {ratio:.2f} times as much as members (median): {correlation}")
    return figure


def accuracy_after_dropping(table: pd.DataFrame) -> Figure:
    """Accuracy once the pairs of largest variance are left out, a row per `dropped` share and `kind`."""
    with style.canvas(6.6, 4.4) as (figure, (axes,)):
        _lines(axes, table, "kind", "dropped", "accuracy", 5)
        axes.set(xlabel="share of most uncertain pairs left out", ylabel="pairs ranked rightly")
        style.percent(axes.xaxis)
        style.percent(axes.yaxis)
        half, most = style.spans(table, "accuracy").max(), table["dropped"].max()
        told = f"95% intervals: up to ±{100 * half:.1f} points, n = {table['count'].max()}"
        style.note(axes, told, "lower left")
        shares = table.pivot(index="kind", columns="dropped", values="accuracy")
        change = 100 * (shares[most] - shares[table["dropped"].min()])
        style.headline(
            figure,
            f"Leaving out {most:.0%}, the most uncertain pairs, changes accuracy by "
            f"{change.min():+.1f} to {change.max():+.1f} points",
        )
        style.legend_outside(figure, axes, 3)
    return figure


def judges(intervals: Mapping[str, Array], persistence: pd.DataFrame) -> Figure:
    """Draw simulated judges: middles and widths of their intervals (responses, 2), by judge; and a row per
    text of `interval` ((b - a)^2 / 12), `fresh`, `persistent` (variance over judges of their mean reward).
    """
    with style.canvas(8.0, 3.9, 3) as (figure, (left, middle, right)):
        for k, (name, bounds) in enumerate(intervals.items()):
            for axes, values, low in ((left, bounds.mean(1), 1), (middle, np.diff(bounds)[:, 0], 0)):
                bins = list(np.linspace(low, 100, 34))
                axes.hist(values, bins, histtype="step", color=style.SERIES[k], linewidth=1.5, label=name)
        count = len(next(iter(intervals.values())))
        left.set(xlabel="middle of the interval", ylabel=f"responses, of {count}", title="Level")
        middle.set(xlabel="width b − a", title="Width")
        for k, column in enumerate(("persistent", "fresh"), start=len(intervals)):
            look: Any = {"color": style.SERIES[k], "markersize": 3, "alpha": 0.7}
            right.plot(persistence["interval"], persistence[column], style.MARKERS[k], label=column, **look)
        line = [persistence["interval"].min(), persistence["interval"].max()]
        right.plot(line, line, color=style.REFERENCE, linewidth=1, linestyle="--")
        right.set(xlabel="(b − a)² / 12", ylabel="variance of a judge's mean", xscale="log", yscale="log")
        right.set_title("Variance over judges")
        right.legend(loc="upper left")
        ratio = persistence.div(persistence["interval"], axis=0).median()
        style.headline(
            figure,
            "Variance over judges of a mean of repeated answers, in units of (b − a)² / 12 (median): "
            f"{ratio['persistent']:.2f} with persistent opinions, {ratio['fresh']:.2f} with fresh answers",
        )
        style.legend_outside(figure, left, 3)
    return figure


def novelty(table: pd.DataFrame) -> Figure:
    """Median variance over the rewards' variance on the world's responses, `inside`, and on strings of
    digits, `outside`, a row per `kind` of ensemble.
    """
    with style.canvas(6.4, 0.36 * len(table) + 1.9) as (figure, (axes,)):
        places = style.lines_of(axes, table["kind"].tolist())
        axes.hlines(places, table["inside"], table["outside"], color=style.REFERENCE, linewidth=1)
        axes.plot(table["inside"], places, "o", color=ONE, ms=8, mfc="none", label="responses of the world")
        axes.plot(table["outside"], places, "D", color=OTHER, label="strings of digits", ms=5)
        style.plain_log(axes)
        axes.set_xlabel("median variance / variance of the reward")
        ratio = table["outside"] / table["inside"]
        style.headline(
            figure,
            f"Variance on strings of digits: {style.times(ratio.min())} to {style.times(ratio.max())} times "
            f"that on the world's responses; {(ratio > 1).sum()} of {len(table)} above 1",
        )
        style.legend_outside(figure, axes, 2)
    return figure


def human_disagreement(table: pd.DataFrame, correlations: Sequence[str], people: str) -> Figure:
    """Variance between reward models, `models`, beside that between people, a row per response and `kind`;
    with a line about the correlation for each kind, and who the people are.
    """
    with style.canvas(7.2, 4.0, table["kind"].nunique(), sharey=True) as (figure, panels):
        groups = table.groupby("kind", sort=False)
        for axes, (kind, rows), text in zip(panels, groups, correlations, strict=True):
            style.scatter_medians(axes, rows, "models", "people", 8, ONE, average="mean")
            style.plain_log(axes)
            axes.set_yscale("symlog", linthresh=0.1)  # people may agree: a variance of zero
            axes.set(xlabel="variance between models", title=f"{kind}\n{text}", ylim=(0, None))
        panels[0].set_ylabel(f"variance between\n{people}")
        kinds = zip(table["kind"].unique(), correlations, strict=True)
        told = "; ".join(f"{text.split(' [')[0]} ({kind})" for kind, text in kinds)
        scale = "Lines: means of eighths. Vertical axis: symmetric-logarithmic, linear below 0.1."
        style.headline(figure, f"Models' variance beside that of {people}: {told}. {scale}")
    return figure
