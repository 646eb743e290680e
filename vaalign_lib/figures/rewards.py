"""The figures of notebook 03: one function each, tidy data in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from vaalign_lib.figures.style import AWARE, GRPO, PESSIMIST, PRINTED, REFERENCE, TRUTH, VANILLA, canvas

Array = NDArray[np.float64]
SEQUENCE = (VANILLA, AWARE, TRUTH, GRPO, PRINTED, PESSIMIST, REFERENCE, "#000000")
MARKERS = "osD^vPX*"


def _grid(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    with canvas(width, height, columns) as (figure, _):
        figure.clear()
        return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _plain_log(axes: Axes, which: str = "x") -> None:
    """Use a logarithmic axis whose minor ticks bear no numbers, which would overlap on short ranges."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        getattr(axes, f"{name}axis").set_minor_formatter(NullFormatter())


def _bounds(values: Array, share: float = 0.995) -> tuple[float, float]:
    return float(np.min(values)), float(np.quantile(values, share))


# --- the world --------------------------------------------------------------------------------------


def world_disagreement(table: pd.DataFrame) -> Figure:
    """Annotators' variance against the gold reward, in the three settings.

    Args:
        table: a row per response and setting: `setting`, `gold`, `variance`, `correlation` (Spearman).
    """
    settings = list(dict.fromkeys(table["setting"]))
    with canvas(9.0, 3.0, len(settings), sharey=True) as (figure, panels):
        for axes, setting in zip(panels, settings, strict=True):
            rows = table[table["setting"] == setting]
            axes.scatter(
                rows["gold"], rows["variance"], s=4, color=REFERENCE, alpha=0.25, linewidths=0,
                rasterized=True,
            )  # fmt: skip
            edges = np.quantile(rows["gold"], np.linspace(0, 1, 11))
            place = np.clip(np.digitize(rows["gold"], edges[1:-1]), 0, 9)
            medians = rows.groupby(place)[["gold", "variance"]].median()
            axes.plot(medians["gold"], medians["variance"], "o-", color=AWARE, markersize=4)
            axes.set(
                yscale="log",
                ylim=(2e-3, 60),
                xlabel="gold reward, corpus SDs",
                title=f"{setting}: ρ = {rows['correlation'].iloc[0]:+.2f}",
            )
        panels[0].set_ylabel("annotators' variance")
    return figure


def selection_gains(table: pd.DataFrame, method: str = "best of n") -> Figure:
    """Gold gained by choosing among the reference's responses, against KL, by category.

    Args:
        table: of `vaalign_lib.policies.best_of_n.gains`.
        method: which rows.
    """
    table = table[table["method"] == method]
    categories, proxies = (list(dict.fromkeys(table["category"])), list(dict.fromkeys(table["proxy"])))
    with canvas(10.4, 3.3, len(categories), sharey=True) as (figure, panels):
        for axes, category in zip(panels, categories, strict=True):
            for k, proxy in enumerate(proxies):
                rows = table[(table["category"] == category) & (table["proxy"] == proxy)]
                axes.errorbar(
                    rows["kl"],
                    rows["gain"],
                    1.96 * rows["error"],
                    color=SEQUENCE[(k + 2) % len(SEQUENCE)],
                    marker=MARKERS[k],
                    markersize=4,
                    linewidth=1.3,
                    label=proxy,
                )
            axes.axhline(0, color=REFERENCE, linewidth=0.8)
            axes.set(xlabel="KL to the reference, nats", title=category)
        panels[0].set_ylabel("gain in gold reward, corpus SDs")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# --- the reward model -------------------------------------------------------------------------------


def reward_model(log: pd.DataFrame, accuracy: pd.DataFrame, threshold: float) -> Figure:
    """Stage 1: its loss, and how often it ranks a pair rightly.

    Args:
        log: `step`, `loss`.
        accuracy: a row per category and judge: `category`, `against`, `accuracy`, `low`, `high`.
        threshold: the loss at which training would stop.
    """
    with canvas(9.0, 3.3, 2) as (figure, (left, right)):
        left.plot(log["step"], log["loss"], color=VANILLA, marker="o", markersize=2.5)
        left.axhline(np.log(2), color=REFERENCE, linestyle=":", linewidth=1)
        left.annotate("chance, ln 2", (log["step"].iloc[-1], np.log(2)), (0, 3),
                      textcoords="offset points", ha="right", color=REFERENCE)  # fmt: skip
        left.axhline(threshold, color=AWARE, linestyle="--", linewidth=1)
        left.annotate(f"stop at {threshold:g}", (log["step"].iloc[0], threshold), (0, 3),
                      textcoords="offset points", color=AWARE)  # fmt: skip
        left.set(xlabel="step", ylabel="loss", title="One head on the whole model", ylim=(0.2, 0.8))
        judges = list(dict.fromkeys(accuracy["against"]))
        for k, judge in enumerate(judges):
            rows = accuracy[accuracy["against"] == judge]
            place = np.arange(len(rows)) + (k - (len(judges) - 1) / 2) * 0.35
            colour = (REFERENCE, TRUTH)[k % 2]
            right.bar(place, rows["accuracy"], 0.33, color=colour, label=judge)
            spread = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
            right.errorbar(place, rows["accuracy"], spread, fmt="none", color="black", linewidth=1)
        right.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        right.set(ylim=(0.4, 1), ylabel="pairs ranked rightly", title="Accuracy, 95% intervals")
        names = list(dict.fromkeys(accuracy["category"]))
        right.set_xticks(range(len(names)), [name.replace("_", " ")[:18] for name in names])
        if len(names) > 4:
            right.tick_params(axis="x", rotation=30)
            for label in right.get_xticklabels():
                label.set_horizontalalignment("right")
        if len(judges) > 1:
            right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return figure


def figure_1(scores: pd.DataFrame, spread: float) -> Figure:
    """Figure 1: the scores of ten reward models for one prompt and its two responses.

    Args:
        scores: a row per model: `model`, `chosen`, `rejected`.
        spread: standard deviation of the mean reward over all responses, as a scale.
    """
    with canvas(6.4, 3.4) as (figure, (axes,)):
        axes.plot(scores["model"], scores["chosen"], "o", color=VANILLA, markersize=8)
        axes.plot(scores["model"], scores["rejected"], "s", color=AWARE, markersize=6)
        for side, colour, height in (("chosen", VANILLA, 0.75), ("rejected", AWARE, 0.25)):
            axes.axhline(scores[side].mean(), color=colour, linewidth=1, linestyle="--")
            axes.annotate(
                f"{side}\nSD {scores[side].std(ddof=1):.2f}",
                (1.02, height),
                xycoords="axes fraction",
                color=colour,
                va="center",
            )
        axes.set(
            xlabel="reward model",
            ylabel="score",
            xticks=scores["model"],
            title=f"One prompt, two responses, {len(scores)} models (SD over responses {spread:.2f})",
        )
    return figure


def figure_8(table: pd.DataFrame, printed: str) -> Figure:
    """Figure 8: variances over ten models, of accepted responses (top) and of differences (bottom).

    Args:
        table: a row per pair: `category`, `accepted`, `difference` (variances).
        printed: what the paper says of the same variances.
    """
    categories = list(dict.fromkeys(table["category"]))
    figure, panels = _grid(2.6 * len(categories) + 0.6, 4.8, 2, len(categories))
    with mpl.rc_context():
        for row, (quantity, colour) in enumerate((("accepted", VANILLA), ("difference", AWARE))):
            limits = _bounds(table[quantity].to_numpy())
            for axes, category in zip(panels[row], categories, strict=True):
                values = table.loc[table["category"] == category, quantity]
                axes.hist(values, bins=list(np.linspace(0, limits[1], 31)), color=colour, alpha=0.75)
                axes.axvline(values.median(), color="black", linewidth=1.2)
                axes.axvline(values.mean(), color="black", linewidth=1.2, linestyle=":")
                axes.text(
                    0.97,
                    0.95,
                    f"median {values.median():.3g}\nmean {values.mean():.3g}\nn = {len(values)}",
                    transform=axes.transAxes,
                    ha="right",
                    va="top",
                    fontsize=9,
                )
                if row == 0:
                    axes.set_title(category)
                axes.xaxis.set_major_locator(MaxNLocator(3))
                axes.set_xlabel(f"variance, {quantity}" + (" response" if row == 0 else ""))
            panels[row][0].set_ylabel("pairs")
        figure.suptitle(f"Ten heads, the paper's recipe. {printed}", fontsize=10, x=0.01, ha="left")
    return figure


def variance_steps(table: pd.DataFrame) -> Figure:
    """Variance between heads against training steps.

    Args:
        table: a row per recipe and step: `recipe`, `step`, `accepted`, `difference` (median variances),
            `loss` (mean over pairs and heads).
    """
    recipes = list(dict.fromkeys(table["recipe"]))
    with canvas(9.6, 3.4, 3) as (figure, panels):
        columns = {
            "accepted": "median variance, accepted",
            "difference": "median variance, difference",
            "loss": "loss of the heads",
        }
        for axes, (column, label) in zip(panels, columns.items(), strict=True):
            for k, recipe in enumerate(recipes):
                rows = table[table["recipe"] == recipe]
                axes.plot(
                    rows["step"].clip(lower=0.7),
                    rows[column],
                    marker=MARKERS[k],
                    markersize=4,
                    color=SEQUENCE[k],
                    label=recipe,
                )
            axes.set(xscale="log", xlabel="step", title=label)
            if column != "loss":
                axes.set_yscale("log")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def disagreement_kinds(table: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """Draw the kinds of disagreement side by side.

    Args:
        table: a row per kind: `kind`, and for each column its value with `<column>_low`, `<column>_high`
            where there is an interval.
        columns: names of columns and their titles.
    """
    place = np.arange(len(table))[::-1]
    with canvas(11.5, 0.36 * len(table) + 1.2, len(columns), sharey=True) as (figure, panels):
        for axes, (column, title) in zip(panels, columns.items(), strict=True):
            if f"{column}_low" in table:
                axes.hlines(
                    place, table[f"{column}_low"], table[f"{column}_high"], color=VANILLA, linewidth=1.5
                )
            axes.plot(table[column], place, "o", color=VANILLA, markersize=6)
            axes.set(title=title)
            axes.grid(axis="y", visible=False)
            if (table[column] > 0).all() and table[column].max() > 20 * table[column].min():
                axes.set_xscale("log")
            elif column.startswith("rank"):
                axes.axvline(0, color=REFERENCE, linewidth=0.8)
        panels[0].set_yticks(place, table["kind"])
    return figure


# --- calibration ------------------------------------------------------------------------------------


def calibration(bins: pd.DataFrame, covered: pd.DataFrame) -> Figure:
    """Errors beside predicted deviations, and coverage; before and after the temperature.

    Args:
        bins: rows of `error_by_deviation` with `against` and `repaired`.
        covered: rows of `coverage` with `against` and `repaired`.
    """
    questions = list(dict.fromkeys(bins["against"]))
    with canvas(10.8, 3.5, 2 * len(questions)) as (figure, panels):
        for k, question in enumerate(questions):
            left, right = panels[2 * k], panels[2 * k + 1]
            for repaired, colour, label in ((False, VANILLA, "before"), (True, AWARE, "after")):
                rows = bins[(bins["against"] == question) & (bins["repaired"] == repaired)]
                spread = [rows["error"] - rows["low"], rows["high"] - rows["error"]]
                left.errorbar(rows["predicted"], rows["error"], spread, fmt="o-", color=colour,
                              markersize=4, linewidth=1, label=label)  # fmt: skip
                rows = covered[(covered["against"] == question) & (covered["repaired"] == repaired)]
                right.plot(rows["nominal"], rows["actual"], "o-", color=colour, markersize=4)
                right.fill_between(rows["nominal"], rows["low"], rows["high"], color=colour, alpha=0.2)
            ends = bins.loc[bins["against"] == question, ["predicted", "error"]].to_numpy()
            line = np.array([ends.min() * 0.8, ends.max() * 1.2])
            left.plot(line, line, color=REFERENCE, linewidth=0.8, linestyle="--")
            _plain_log(left, "xy")
            left.set(xlabel="predicted SD", ylabel="error, RMS",
                     title=f"against {question}")  # fmt: skip
            left.legend(title="temperature", fontsize=8, title_fontsize=8)
            right.plot([0.4, 1], [0.4, 1], color=REFERENCE, linewidth=0.8, linestyle="--")
            right.set(xlabel="nominal coverage", ylabel="actual coverage", ylim=(0, 1.02))
    return figure


def ensemble_spread(table: pd.DataFrame, correlation: str) -> Figure:
    """Draw what ensembles say about themselves beside how independent ensembles differ.

    Args:
        table: a row per response: `within` (variance of single members), `between` (variance of the
            mean over ensembles), `members`.
        correlation: the rank correlation, in words.
    """
    with canvas(5.0, 4.2) as (figure, (axes,)):
        axes.scatter(table["within"], table["between"], s=6, alpha=0.4, color=VANILLA, linewidths=0,
                     rasterized=True)  # fmt: skip
        line = np.array([table["within"].min(), table["within"].max()])
        axes.plot(line, line, color=REFERENCE, linewidth=1, linestyle="--")
        axes.annotate("equal", (line[1], line[1]), (-4, 2), textcoords="offset points", ha="right",
                      color=REFERENCE)  # fmt: skip
        members = int(table["members"].iloc[0])
        axes.plot(line, line / members, color=AWARE, linewidth=1, linestyle="--")
        axes.annotate(f"1/{members}", (line[1], line[1] / members), (-4, -12), ha="right",
                      textcoords="offset points", color=AWARE)  # fmt: skip
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="variance of members, within an ensemble",
            ylabel="variance of the mean, between ensembles",
            title=correlation,
        )
    return figure


def accuracy_after_dropping(table: pd.DataFrame) -> Figure:
    """Accuracy once the pairs of largest variance are left out, by kind.

    Args:
        table: rows of `accuracy_after_dropping` with `kind`.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    with canvas(6.4, 3.6) as (figure, (axes,)):
        for k, kind in enumerate(kinds):
            rows = table[table["kind"] == kind]
            axes.errorbar(
                rows["dropped"] + 0.006 * (k - len(kinds) / 2),
                rows["accuracy"],
                [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]],
                color=SEQUENCE[k],
                marker=MARKERS[k],
                markersize=4,
                linewidth=1,
                label=kind,
            )
        axes.set(xlabel="share of most uncertain pairs left out", ylabel="pairs ranked rightly")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


# --- judges and people ------------------------------------------------------------------------------


def judges(intervals: Mapping[str, Array], persistence: pd.DataFrame) -> Figure:
    """Draw simulated judges: middles and widths of their intervals; fresh and persistent rewards.

    Args:
        intervals: bounds (responses, 2) by judge.
        persistence: a row per text: `interval` ((b - a)^2 / 12), `fresh` and `persistent` (variance over
            judges of their mean reward of that text, asked repeatedly).
    """
    with canvas(10.4, 3.4, 3) as (figure, (left, middle, right)):
        for k, (name, bounds) in enumerate(intervals.items()):
            style: Any = {"histtype": "step", "color": SEQUENCE[k], "linewidth": 1.5, "label": name}
            left.hist(bounds.mean(1), bins=list(np.linspace(1, 100, 34)), **style)
            middle.hist(np.diff(bounds)[:, 0], bins=list(np.linspace(0, 100, 34)), **style)
        left.set(xlabel="middle of the interval", ylabel="responses", title="Level")
        middle.set(xlabel="width b − a", title="Width")
        for column, colour, marker in (("persistent", AWARE, "o"), ("fresh", VANILLA, "s")):
            right.plot(persistence["interval"], persistence[column], marker, color=colour,
                       markersize=3, alpha=0.7, label=column)  # fmt: skip
        line = np.array([persistence["interval"].min(), persistence["interval"].max()])
        right.plot(line, line, color=REFERENCE, linewidth=1, linestyle="--")
        right.set(xscale="log", yscale="log", xlabel="(b − a)² / 12", title="Variance over judges",
                  ylabel="variance of a judge's mean")  # fmt: skip
        right.legend(fontsize=8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def novelty(table: pd.DataFrame) -> Figure:
    """Variance on the world's responses and on strings of digits, by kind of ensemble.

    Args:
        table: a row per kind: `kind`, `inside`, `outside` (median variances over the rewards' variance).
    """
    place = np.arange(len(table))[::-1]
    with canvas(6.6, 0.36 * len(table) + 1.2) as (figure, (axes,)):
        axes.hlines(place, table["inside"], table["outside"], color=REFERENCE, linewidth=1)
        axes.plot(table["inside"], place, "o", color=VANILLA, label="responses of the world")
        axes.plot(table["outside"], place, "D", color=AWARE, label="strings of digits")
        _plain_log(axes)
        axes.set(xlabel="median variance / variance of the reward")
        axes.set_yticks(place, table["kind"])
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def human_disagreement(table: pd.DataFrame, correlations: Sequence[str], people: str) -> Figure:
    """Variance between reward models beside variance between people.

    Args:
        table: a row per response and kind: `kind`, `models`, `people` (variances).
        correlations: a line of text for each kind.
        people: who they are.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    with canvas(3.4 * len(kinds), 3.4, len(kinds)) as (figure, panels):
        for axes, kind, text in zip(panels, kinds, correlations, strict=True):
            rows = table[table["kind"] == kind]
            axes.scatter(rows["models"], rows["people"], s=6, alpha=0.35, color=VANILLA, linewidths=0,
                         rasterized=True)  # fmt: skip
            order = np.array_split(np.argsort(rows["models"].to_numpy(), kind="stable"), 8)
            means = [rows.iloc[part][["models", "people"]].mean() for part in order]
            axes.plot([m["models"] for m in means], [m["people"] for m in means], "o-", color=AWARE,
                      markersize=4)  # fmt: skip
            _plain_log(axes)
            axes.set_yscale("symlog", linthresh=0.1)  # people may agree: a variance of zero
            axes.set(xlabel="variance between models", title=f"{kind}\n{text}")
        panels[0].set_ylabel(f"variance between {people}")
    return figure
