"""Figures of notebook 05: forests of Tables 1 and 3, the check of the printed statistics, power."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaalign_lib.figures import style
from vaalign_lib.statistics.returns import Ratio
from vaalign_lib.statistics.tests import Estimate, difference

WIDEST = 20  # ratio to which forests reach
PAPER = "The paper's rows: one judge for all, equal mean penalty"
PRIMARY = "Four worlds: a judge each, equal KL"
SOURCES = {"urme-aleatoric": "URME, aleatoric variance", "urme-epistemic": "URME, epistemic variance"}


def variance_forest(table: pd.DataFrame, primary: Sequence[bool], pooled: Estimate | None = None) -> Figure:
    """Draw ratios of variances with their intervals and the paper's, a line for each comparison.

    `table`: of `tables.variances`; `primary`: which rows are stacks of the primary endpoint; `pooled`: the
    ratio of training variances over these stacks.
    """
    with style.canvas(7.2, 0.27 * len(table) + 2.9) as (figure, [axes]):
        table, places = _comparisons(
            axes, table, primary, table["ratio"].where(table["floored"] < Ratio.FLOORED)
        )
        sure, small = table["floored"] < Ratio.FLOORED, {"markersize": 3, "linewidth": 1}
        style.forest(axes, table, places + 0.17, "f", style.REFERENCE, label="total variances (F)", **small)
        for chosen, colour, name in (
            (sure, style.AWARE, "training variances"),
            (~sure, "#F0B690", "... not above the evaluation's noise"),
        ):
            if chosen.any():
                at, look = (places - 0.17)[chosen], {"fmt": "D", "label": name}
                look |= {"mfc": "white"} if chosen is not sure else {}
                style.forest(axes, table[chosen], at, "ratio", colour, **look)
                out = (table["ratio"][chosen] > WIDEST).to_numpy()
                face = look.get("mfc", colour)
                axes.plot(np.full(out.sum(), 0.93 * WIDEST), at[out], ">", color=colour, mfc=face, ms=5)
        _printed(axes, table, places + 0.17, "f_printed")
        more, less = ((beyond & sure).sum() for beyond in (table["ratio_low"] > 1, table["ratio_high"] < 1))
        found = f"Of {len(table)} comparisons vanilla varies more in {more}, less in {less} "
        found += "(95% interval without 1)."
        found += f" Arrows: beyond {WIDEST}." if (table["ratio"] > WIDEST).any() else ""
        if pooled is not None:
            axes.axvspan(pooled.low, pooled.high, color=style.AWARE, alpha=0.12, linewidth=0)
            place = places[(table["group"] == PRIMARY).to_numpy()].max() + 1  # beside the group's name
            row, at = pd.DataFrame([pooled.columns("ratio")]), np.array([place])
            style.forest(axes, row, at, "ratio", "black", fmt="D", markersize=7, label="mean over its worlds")
            interval = f"{pooled.value:.2f} [{pooled.low:.2f}, {pooled.high:.2f}]"
            whose = f"{PRIMARY}: vanilla's training variance is {interval} times variance-aware's"
            found = f"{whose}. {found}"
        style.octaves(axes, "x", [0.11, WIDEST / 1.1])  # longer lines leave the panel
        axes.set_xlabel("variance, vanilla : variance-aware")
        style.headline(figure, found)
        style.legend_outside(figure, axes, 2)
        return figure


def risk_forest(table: pd.DataFrame, primary: Sequence[bool]) -> Figure:
    """Draw differences in risk with their intervals and the paper's, a line for each comparison.

    `table`: of `tables.risks`; `primary`: which rows are stacks of the primary endpoint.
    """
    with style.canvas(7.2, 0.24 * len(table) + 2.6) as (figure, [axes]):
        table, places = _comparisons(axes, table, primary)
        style.forest(axes, table, places - 0.1, "risk_difference", style.AWARE, label="here")
        _printed(axes, table, places + 0.2, "risk_difference_printed")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("risk, vanilla minus variance-aware")
        lower, higher = (table["risk_difference_low"] > 0).sum(), (table["risk_difference_high"] < 0).sum()
        style.headline(
            figure,
            f"Of {len(table)} comparisons of {table['policies'].max()} policies with as many, variance-aware "
            f"risk is lower in {lower}, higher in {higher} (95% interval without 0).",
        )
        style.legend_outside(figure, axes, 2)
        return figure


def _comparisons(
    axes: Axes, table: pd.DataFrame, primary: Sequence[bool], values: pd.Series | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """Group the comparisons and name a line for each; return them in this order, and their places. In a group
    they come by falling values, those without one last, or by row.
    """
    regime = table["condition"].str.extract(f"({'|'.join(style.REGIMES)})", expand=False)
    group = (
        regime.map(style.REGIMES)
        .where(~table["main"], PAPER)
        .where(~pd.Series(primary, table.index), PRIMARY)
    )
    order = [PAPER, PRIMARY, *style.REGIMES.values()]
    table = table.assign(
        group=pd.Categorical(group, order), order=table["row"] if values is None else -values
    )
    table = table.sort_values(["group", "order"], kind="stable").drop(columns="order")
    words = dict.fromkeys(style.REGIMES, "")
    words |= {"shared source": "one source", "independent source": "a source each"}
    names = []
    for row in table.to_dict("records"):
        parts = row["condition"].split(", ")
        if row["group"] in (PAPER, PRIMARY):
            parts = parts[2:]  # what the group's name says
        if row["group"] == PRIMARY and sum(primary) > 1 and not parts:
            parts = ["world 0"]
        policy = row["policy"].split("-like")[0]
        source = row["reward_model"].removeprefix("stand-in for ").split(" on ")[0]
        names.append(
            ", ".join(filter(None, [policy, _in_words(source), *(words.get(part, part) for part in parts)]))
        )
    return table, style.lines_of(axes, names, table["group"].tolist())


def _in_words(text: str) -> str:
    for name, words in SOURCES.items():
        text = text.replace(name, words)
    return text


def _printed(axes: Axes, table: pd.DataFrame, places: np.ndarray, name: str) -> None:
    chosen = table[name].notna().to_numpy()
    if chosen.any():
        look = {"fmt": "x", "linewidth": 1, "label": "the paper's"}
        style.forest(axes, table[chosen], places[chosen], name, style.PRINTED, **look)


def printed_statistics(table: pd.DataFrame) -> Figure:
    """Draw every printed statistic beside the range that its printed inputs allow.

    `table`: of `recomputed.audit`.
    """
    panels = {
        "Table 1: F": ("F", (2, 3, 5, 10)),
        "Table 2: t": ("|t|", None),
        "Table 2: critical t": ("critical t", None),
        "Table 3: p": ("p", (1e-5, 1e-3, 0.05)),
        "Table 4: ratio": ("ratio", None),
        "Table 4: SDs' variance": ("variance of the SDs, rescaled", (0.1, 0.3, 1, 3)),
    }
    with style.canvas(7.4, 8.2, 2, 3) as (figure, places):
        for axes, (title, (quantity, ticks)) in zip(places, panels.items(), strict=True):
            rows = table[(table["item"] == title.split(":")[0]) & (table["quantity"] == quantity)]
            _recomputed(axes, rows)
            if ticks is not None:
                style.log_ticks(axes, "x", ticks)
            axes.set_title(f"{title}\n{rows['consistent'].sum()} of {len(rows)} agree")
        places[3].axvline(0.05, color="black", linewidth=0.8, linestyle=":")
        style.headline(
            figure,
            f"{table['consistent'].sum()} of {len(table)} printed statistics follow from the printed inputs "
            "(filled); the others do not (open). Bars: what the inputs allow, rounded as printed.",
        )
        return figure


def _recomputed(axes: Axes, rows: pd.DataFrame) -> None:
    places, agree = style.lines_of(axes, rows["row"].tolist()), rows["consistent"]
    low = rows["low"].where(~agree, rows[["low", "printed"]].min(axis=1))  # what rounds to the printed number
    high = rows["high"].where(~agree, rows[["high", "printed"]].max(axis=1))
    axes.use_sticky_edges = False  # the bars end inside of the panel
    axes.barh(places, high - low, left=low, height=0.5, color=style.REFERENCE, alpha=0.4)
    for chosen, colour, face in ((agree, style.TRUTH, style.TRUTH), (~agree, style.PRINTED, "white")):
        axes.scatter(rows.loc[chosen, "printed"], places[chosen], s=30, zorder=3, ec=colour, fc=face, lw=1.6)


def policies_needed(table: pd.DataFrame, policies: int) -> Figure:
    """Draw how many policies of each method would see the printed differences in risk.

    `table`: of `recomputed.risk_tests`; `policies`: how many there were.
    """
    with style.canvas(6.4, 3.2) as (figure, [axes]):
        places, seen = style.lines_of(axes, table["row"].tolist()), table["needed"] <= policies
        colours = np.where(seen, style.TRUTH, style.PRINTED)
        axes.hlines(places, 10, table["needed"], color=colours, linewidth=2)
        axes.scatter(table["needed"], places, color=colours, s=30, zorder=3)
        for place, needed, power in zip(places, table["needed"], table["power"], strict=True):
            text = f"{needed}; power of {policies}: {power:.0%}"
            axes.text(needed * 1.15, place, text, va="center", fontsize=9)
        axes.axvline(policies, color="black", linewidth=0.8, linestyle=":")
        style.log_ticks(axes, "x", (10, 30, policies, 300, 1000))
        axes.set(xlim=(10, 12000), xlabel="policies of each method for 80% power (one-sided z test, 5%)")
        found = f"{seen.sum()} of {len(table)} printed differences"
        style.headline(figure, f"{policies} policies see {found} with 80% power")
        return figure


def risk_measures(table: pd.DataFrame, measures: Mapping[str, str]) -> Figure:
    """Draw measures of risk of both methods, a panel for each measure, a line for each comparison.

    `table`: of `tables.further_risks`; one unit; `measures`: titles of the panels by measure.
    """
    wide = table[table["measure"].isin(measures)]
    names = list(dict.fromkeys(zip(wide["row"], wide["condition"], strict=True)))
    with style.canvas(7.6, 0.42 * len(names) + 1.9, len(measures), sharey=True) as (figure, panels):
        short = [text.replace(" source", "").replace(", matched KL", "") for _, text in names]
        lines = [f"{_in_words(row)},\n{text}" for (row, _), text in zip(names, short, strict=True)]
        place_of, told = dict(zip(names, style.lines_of(panels[0], lines), strict=True)), []
        for axes, (measure, title) in zip(panels, measures.items(), strict=True):
            one = wide[wide["measure"] == measure]
            for (method, name), shift in zip(style.METHODS.items(), (0.13, -0.13), strict=True):
                rows = one[one["method"] == method]
                at = np.array([place_of[pair] for pair in zip(rows["row"], rows["condition"], strict=True)])
                style.forest(axes, rows, at + shift, "value", style.POLICY_COLOURS[name], label=name)
            better, worse = _clear(one)
            told.append(f"{better} and {worse} ({title})")
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(fill(title, 20))
            axes.grid(axis="y", visible=False)
        style.headline(
            figure,
            f"Of {len(names)} comparisons variance-aware policies are clearly better and clearly worse in: "
            f"{', '.join(told)}. Clearly: by a 95% interval, made of those drawn.",
        )
        style.legend_outside(figure, panels[0], 2)
        return figure


def _clear(table: pd.DataFrame) -> tuple[int, int]:
    """Count where variance-aware's value is above vanilla's, and below, by the interval of `difference`."""
    found = table.assign(
        estimate=[Estimate(*one, 0) for one in zip(table["value"], *style.ends(table, "value"), strict=True)]
    )
    wide = found.pivot(index=["row", "condition"], columns="method", values="estimate")
    gaps = [difference(*pair) for pair in zip(wide["variance_aware"], wide["vanilla"], strict=True)]
    return sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
