"""Figures of notebook 08."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaalign_lib.figures import style
from vaalign_lib.statistics.tests import Estimate

COLOURS = {
    "vanilla": style.VANILLA,
    "variance-aware": style.AWARE,
    "variance-aware, exact": style.AWARE,
    "placebo": style.REFERENCE,
}
BENCHES = {
    "judges": "judges, right variances",
    "unreliable judges": "unreliable judges, right variances",
    "reward models": "learned reward models",
}
MARKS = "osD^vPX*<>hdp"
OTHERS = (*style.SERIES[:6], style.GRPO, style.PRINTED, style.PESSIMIST)


def colour_of(methods: list[str]) -> dict[str, str]:
    """Return a colour for every method: vanilla and variance-aware the house's, the others in their order."""
    rest = [one for one in methods if one not in COLOURS]
    return {one: COLOURS.get(one) or OTHERS[rest.index(one) % len(OTHERS)] for one in methods}


def frontier(means: pd.DataFrame, shares: pd.DataFrame, said: str) -> Figure:
    """Draw gain against deviation, a panel a bench, a line a method over KLs; open marks are dominated.

    `means`: of `frontier_tables.means` by bench, n and method; `shares`: of `.frontier_shares`.
    """
    methods = means["method"].unique().tolist()
    colours = colour_of(methods)
    is_on = shares.set_index(["bench", "n", "method"])["on_frontier"]
    with style.canvas(11.0, 5.2, 3) as (figure, panels):
        for axes, (bench, title) in zip(panels, BENCHES.items(), strict=True):
            for k, method in enumerate(methods):
                rows = means[(means["bench"] == bench) & (means["method"] == method)].sort_values("n")
                if rows.empty:
                    continue
                marker = MARKS[k % len(MARKS)]
                axes.plot(rows["deviation"], rows["gain"], color=colours[method], linewidth=0.9, alpha=0.8)
                for row in rows.to_dict("records"):
                    on = bool(is_on.get((bench, row["n"], method), False))
                    face = colours[method] if on else "white"
                    x, y = ([[one] for one in _span(row, name)] for name in ("deviation", "gain"))
                    axes.errorbar(
                        row["deviation"], row["gain"], xerr=x, yerr=y, fmt=marker, color=colours[method],
                        markerfacecolor=face, markersize=5, linewidth=0.8,
                    )  # fmt: skip
                axes.plot([], [], marker=marker, color=colours[method], label=method, linewidth=0.9)
            here = means.loc[means["bench"] == bench, "deviation"]
            style.log_ticks(axes, "x", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
            axes.set_xlim(0.6 * here.min(), 1.6 * here.max())
            axes.set_title(title)
            axes.set_xlabel("SD of gold over policies")
        panels[0].set_ylabel("mean gain in gold")
        style.headline(figure, said)
        style.legend_outside(figure, panels[2], 5)
        return figure


def _span(row: dict[str, float], name: str) -> tuple[float, float]:
    return row[name] - row[f"{name}_low"], row[f"{name}_high"] - row[name]


def against_vanilla(
    differences: pd.DataFrame, said: str, benches: Mapping[str, str] = MappingProxyType(BENCHES)
) -> Figure:
    """Draw every method's CVaR and mean gain minus vanilla's, with intervals over worlds, a panel a bench.

    `differences`: bench, method, and `gain`, `cvar_10` with their ends; `benches`: their titles. Methods
    come in one order, by their mean CVaR over benches; a line is empty where a bench has not the method.
    """
    shown = differences[differences["bench"].isin(list(benches))]
    order = shown.groupby("method")["cvar_10"].mean().sort_values(ascending=False).index.tolist()
    with style.canvas(3.2 * len(benches) + 0.9, 4.6, len(benches), sharey=True) as (figure, panels):
        place_of = dict(zip(order, style.lines_of(panels[0], order), strict=True))
        for axes, (bench, title) in zip(panels, benches.items(), strict=True):
            rows = shown[shown["bench"] == bench]
            places = rows["method"].map(place_of).to_numpy(dtype=float)
            axes.grid(axis="y", visible=False)
            marks = (
                ("cvar_10", style.SERIES[0], -0.14, "CVaR10"),
                ("gain", style.SERIES[1], 0.14, "mean gain"),
            )
            for column, colour, shift, name in marks:
                style.forest(axes, rows, places + shift, column, colour, label=name)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel("minus vanilla's")
        style.headline(figure, said)
        style.legend_outside(figure, panels[0], 2)
        return figure


def dose_axis(
    doses: pd.DataFrame, sources: pd.DataFrame, broken_even: dict[str, Estimate], said: str
) -> Figure:
    """Draw (gain / SD)^2 over vanilla's against what weights know of squared errors, a panel a bench.

    `doses`, `sources`: of `frontier_tables.means`, of `correlation` and `log_ratio`; the line is the family
    with a chosen correlation, the band its break-even.
    """
    with style.canvas(11.0, 4.8, 3) as (figure, panels):
        for axes, (bench, title) in zip(panels, BENCHES.items(), strict=True):
            rows = doses[doses["bench"] == bench]
            line = rows[rows["method"] == "correlated"].sort_values("dose")
            _points(axes, line, style.SERIES[0], "o-", "chosen correlation")
            others = rows[rows["method"] != "correlated"]
            for k, (name, part) in enumerate(others.groupby("method", sort=False)):
                _points(axes, part, style.SERIES[1 + k % 7], style.MARKERS[1 + k % 7], str(name), size=3.5)
            for row in sources[sources["bench"] == bench].to_dict("records"):
                axes.plot(row["correlation"], row["log_ratio"], "*", color="black", markersize=7)
            _labelled(axes, sources[sources["bench"] == bench])
            found = broken_even[bench]
            if np.isfinite([found.low, found.high]).all():
                axes.axvspan(found.low, found.high, color=style.REFERENCE, alpha=0.2, linewidth=0)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel("rank correlation with squared errors")
        panels[0].set_ylabel("ln of (gain / SD)² over vanilla's")
        style.headline(figure, said)
        style.legend_outside(figure, panels[0], 4)
        return figure


def _points(axes: Axes, rows: pd.DataFrame, colour: str, mark: str, name: str, size: float = 4.5) -> None:
    axes.errorbar(
        rows["correlation"], rows["log_ratio"], yerr=style.spans(rows, "log_ratio"), fmt=mark, color=colour,
        markersize=size, linewidth=1.2, label=name,
    )  # fmt: skip


def _labelled(axes: Axes, rows: pd.DataFrame) -> None:
    """Name sources beside their points, so far apart in height that no two names overlap."""
    if rows.empty:
        return
    ordered = rows.sort_values("log_ratio")
    low, high = axes.get_ylim()
    points, gaps = ordered["log_ratio"].to_numpy(dtype=float), 0.055 * (high - low) * np.arange(len(ordered))
    up = np.maximum.accumulate(points - gaps) + gaps  # each as far above the last as a name is high
    down = np.minimum.accumulate((points - gaps)[::-1])[::-1] + gaps  # below the next
    height = (up + down) / 2
    for row, y in zip(ordered.to_dict("records"), height, strict=True):
        axes.annotate(
            str(row["method"]), (row["correlation"], row["log_ratio"]), (1.04, y), fontsize=style.SMALL,
            textcoords=axes.get_yaxis_transform(), va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def choices(table: pd.DataFrame, said: str) -> Figure:
    """Draw the regret of each way to choose beta in mean gain and in CVaR, a panel a bench and method.

    `table`: of `frontier_tables.means` by bench, method and choice, of `regret_gain` and `regret_cvar`.
    """
    pairs = [(bench, method) for method in ("vanilla", "variance-aware") for bench in BENCHES]
    with style.canvas(10.5, 5.4, 3, 2) as (figure, panels):
        for axes, (bench, method) in zip(panels, pairs, strict=True):
            rows = table[(table["bench"] == bench) & (table["method"] == method)]
            names = rows["choice"].tolist() if bench == pairs[0][0] else [""] * len(rows)
            places = style.lines_of(axes, names)
            for column, colour, shift, name in (
                ("regret_gain", style.SERIES[1], 0.12, "of mean gain"),
                ("regret_cvar", style.SERIES[0], -0.12, "of CVaR10"),
            ):
                style.forest(axes, rows, places + shift, column, colour, label=name)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(f"{bench}, {method}")
        for axes in panels[3:]:
            axes.set_xlabel("regret against the best in hindsight")
        style.headline(figure, said + _exceptions(table, pairs))
        style.legend_outside(figure, panels[0], 2)
        return figure


def _exceptions(table: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> str:
    """Say in which panels other choices have less regret in CVaR than the one of least mean regret."""
    best, told = str(table.groupby("choice")["regret_cvar"].mean().idxmin()), []
    for bench, method in pairs:
        rows = table[(table["bench"] == bench) & (table["method"] == method)]
        here = rows.set_index("choice")["regret_cvar"].astype(float).sort_values()
        if best not in here or not (less := here[here < here[best] - 0.0005]).size:  # as digits show it
            continue
        named = [f"{name} {value:.3f}" for name, value in [*less.items(), (best, here[best])]]
        told.append(f"{bench}, {method}, {', '.join(named)}")
    return f". Not everywhere: {'; '.join(told)}" if told else ""


def tails(table: pd.DataFrame, said: str) -> Figure:
    """Draw risk, CVaR and expected loss of both policies against the second arm's variance.

    `table`: of `theory.simulations.tail_counterexample`.
    """
    names = {"risk": "risk", "cvar": "CVaR10", "loss": "expected loss"}
    with style.canvas(9.0, 3.2, 3) as (figure, panels):
        for axes, (column, name) in zip(panels, names.items(), strict=True):
            for policy, colour in (("vanilla", style.VANILLA), ("variance-aware", style.AWARE)):
                rows = table[table["policy"] == policy]
                axes.plot(rows["noise"], rows[column], "o-", color=colour, markersize=4, label=policy)
            style.plain_log(axes)
            axes.set_title(name)
            axes.set_xlabel("variance of the second arm")
        panels[0].set_ylim(0, 0.3)
        style.headline(figure, said)
        style.legend_outside(figure, panels[0], 2)
        return figure
