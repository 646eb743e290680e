"""Figures of notebook 05: forests of Tables 1 and 3, the check of the printed statistics, power."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaalign_lib.figures.style import AWARE, PRINTED, REFERENCE, TRUTH, VANILLA, canvas
from vaalign_lib.statistics.returns import Ratio

OCTAVES = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]


def variance_forest(table: pd.DataFrame) -> Figure:
    """Draw ratios of variances with their intervals and the paper's, a line for each comparison.

    Args:
        table: of `tables.table_1`.
    """
    with canvas(8.4, 0.34 * len(table) + 1.5) as (figure, [axes]):
        places = _comparisons(axes, table)
        axes.errorbar(
            table["f"], places + 0.16, xerr=_spans(table, "f"), fmt="o", color=REFERENCE,
            markersize=3.5, linewidth=1, label="F, total variances",
        )  # fmt: skip
        for sure in (True, False):
            chosen = (table["floored"] < Ratio.FLOORED).to_numpy() == sure
            if chosen.any():
                axes.errorbar(
                    table.loc[chosen, "ratio"], (places - 0.16)[chosen],
                    xerr=_spans(table[chosen], "ratio"), fmt="D", color=AWARE, markersize=4,
                    alpha=1 if sure else 0.35,
                    label="training variances" if sure else "... not above the noise",
                )  # fmt: skip
        _printed_marks(axes, table, places, "f_printed")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(0.1, 20)  # longer lines leave the panel
        axes.set_xticks(OCTAVES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set_xlabel("variance, vanilla : variance-aware; 95% intervals")
        axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
        return figure


def risk_forest(table: pd.DataFrame) -> Figure:
    """Draw differences in risk with their intervals and the paper's, a line for each comparison.

    Args:
        table: of `tables.table_3`.
    """
    with canvas(8.4, 0.3 * len(table) + 1.5) as (figure, [axes]):
        places = _comparisons(axes, table)
        axes.errorbar(
            table["fall"], places - 0.14, xerr=_spans(table, "fall"), fmt="o", color=AWARE,
            markersize=4, label="here",
        )  # fmt: skip
        _printed_marks(axes, table, places + 0.14, "fall_printed")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("risk, vanilla minus variance-aware; 95% intervals")
        axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        return figure


def _comparisons(axes: Axes, table: pd.DataFrame) -> np.ndarray:
    """Label a line for every comparison; return their places."""
    places = np.arange(len(table), dtype=float)[::-1]
    named = zip(table["row"], table["condition"], strict=True)
    axes.set_yticks(places, [f"{row}, {condition}" for row, condition in named], fontsize=7.5)
    axes.set_ylim(-0.7, len(table) - 0.3)
    main = int(table["main"].sum())
    if 0 < main < len(table):  # the paper's seven come first
        axes.axhline(len(table) - main - 0.5, color=REFERENCE, linewidth=0.6, linestyle=":")
    return places


def _spans(table: pd.DataFrame, name: str) -> np.ndarray:
    low, high = (table[f"{name}_{end}"].to_numpy() for end in ("low", "high"))
    value = table[name].to_numpy()
    return np.stack([value - low, high - value])


def _printed_marks(axes: Axes, table: pd.DataFrame, places: np.ndarray, name: str) -> None:
    chosen = table[name].notna().to_numpy()
    if chosen.any():
        rows = table[chosen]
        axes.errorbar(
            rows[name], places[chosen], xerr=_spans(rows, name), fmt="x", color=PRINTED,
            markersize=5, linewidth=1, label="the paper's",
        )  # fmt: skip


# --- the printed statistics -----------------------------------------------------------------------------


def printed_statistics(table: pd.DataFrame) -> Figure:
    """Draw every printed statistic beside the range that its printed inputs allow.

    Args:
        table: of `recomputed.audit`.
    """
    kinds = {
        ("Table 1", "F"): ("Table 1: F", "log"),
        ("Table 2", "|t|"): ("Table 2: t", "linear"),
        ("Table 2", "critical t"): ("Table 2: critical t", "linear"),
        ("Table 3", "p"): ("Table 3: p", "log"),
        ("Table 4", "ratio"): ("Table 4: ratio", "linear"),
        ("Table 4", "variance of the SDs, rescaled"): ("Table 4: variance of SDs", "log"),
    }
    with canvas(10.5, 6.0, 3, 2) as (figure, panels):
        for axes, (kind, (title, scale)) in zip(panels, kinds.items(), strict=True):
            chosen = (table["item"] == kind[0]) & (table["quantity"] == kind[1])
            _recomputed(axes, table[chosen])
            axes.set_title(title)
            axes.set_xscale(scale)
            if scale == "log" and kind[0] != "Table 3":
                axes.minorticks_off()
                low, high = axes.get_xlim()
                ticks = [tick for tick in (0.1, 0.3, 1, 2, 3, 5, 10) if low <= tick <= high]
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[3].axvline(0.05, color="black", linewidth=0.8, linestyle=":")
        figure.suptitle(
            "bar: what the printed inputs allow; filled mark: the printed result is consistent, "
            "open: it is not",
            fontsize=9,
        )
        return figure


def _recomputed(axes: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))[::-1]
    widths = rows["high"].to_numpy() - rows["low"].to_numpy()
    axes.barh(places, widths, left=rows["low"], height=0.5, color=REFERENCE, alpha=0.4)
    for consistent, colour in ((True, TRUTH), (False, AWARE)):
        chosen = (rows["consistent"] == consistent).to_numpy()
        axes.scatter(
            rows.loc[chosen, "printed"], places[chosen], s=34, zorder=3, edgecolors=colour,
            facecolors=colour if consistent else "none", linewidths=1.6,
        )  # fmt: skip
    axes.set_yticks(places, rows["row"], fontsize=7.5)


def policies_needed(table: pd.DataFrame, policies: int) -> Figure:
    """Draw how many policies of each method would see the printed differences in risk.

    Args:
        table: of `recomputed.risk_tests`.
        policies: how many there were.
    """
    with canvas(6.4, 3.0) as (figure, [axes]):
        places = np.arange(len(table))[::-1]
        seen = (table["needed"] <= policies).to_numpy()
        colours = np.where(seen, TRUTH, AWARE)
        axes.hlines(places, 10, table["needed"], color=colours, linewidth=2)
        axes.scatter(table["needed"], places, color=colours, s=30, zorder=3)
        for place, line in zip(places, table.to_dict("records"), strict=True):
            text = f" {line['needed']}; power of {policies}: {line['power']:.0%}"
            axes.text(line["needed"] * 1.06, place, text, va="center", fontsize=8)
        axes.axvline(policies, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(10, 9000)
        axes.set_xticks([10, 30, 80, 300, 1000], ["10", "30", "80", "300", "1000"])
        axes.minorticks_off()
        axes.set_yticks(places, table["row"], fontsize=8)
        axes.set_xlabel("policies of each method for 80% power (one-sided z test, 5%)")
        return figure


def risk_measures(table: pd.DataFrame, measures: Mapping[str, str]) -> Figure:
    """Draw measures of risk of both methods, a panel for each measure, a line for each comparison.

    Args:
        table: of `tables.further_risks`; one unit.
        measures: titles of the panels by measure.
    """
    labels = list(dict.fromkeys(zip(table["row"], table["condition"], strict=True)))
    size = 3.0 * len(measures) + 2.2, 0.42 * len(labels) + 1.2
    with canvas(*size, len(measures), sharey=True) as (figure, panels):
        places = pd.Series(np.arange(len(labels), dtype=float)[::-1], index=labels)
        for axes, (measure, title) in zip(panels, measures.items(), strict=True):
            for method, colour, shift in (("vanilla", VANILLA, 0.13), ("variance_aware", AWARE, -0.13)):
                rows = table[(table["measure"] == measure) & (table["method"] == method)]
                at = np.array([places[pair] for pair in zip(rows["row"], rows["condition"], strict=True)])
                axes.errorbar(
                    rows["value"], at + shift, xerr=_ends(rows), fmt="o", color=colour,
                    markersize=4, label=method.replace("_", "-"),
                )  # fmt: skip
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(title, fontsize=9)
        panels[0].set_yticks(places, [f"{row}, {condition}" for row, condition in labels], fontsize=7.5)
        panels[-1].legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1.08), ncols=2)
        return figure


def _ends(rows: pd.DataFrame) -> np.ndarray:
    """Return the distances to the ends of intervals; none where there is no interval."""
    value = rows["value"].to_numpy()
    low, high = (rows[name].fillna(rows["value"]).to_numpy() for name in ("low", "high"))
    return np.stack([value - low, high - value]).clip(min=0)
