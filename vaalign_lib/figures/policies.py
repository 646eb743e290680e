"""Figures of policies in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from vaalign_lib.figures.style import EXACT, GRPO, PESSIMIST, POLICY_COLOURS, PRINTED, REFERENCE, canvas
from vaalign_lib.statistics.returns import Ratio

LABELS = {
    "reward": "reward, SDs of the reference",
    "gold": "gold reward, SDs of the corpus",
    "true_reward": "true reward, the source's unit",
    "kl": "KL to the reference, nats",
    "length": "tokens of a response",
    "variance": "variance of the reward, 1 = reference",
}


def learning_curves(
    curves: Mapping[str, pd.DataFrame],
    measures: Sequence[str] = ("reward", "gold", "kl", "length"),
    title: str = "",
) -> Figure:
    """Draw mean curves over policies, with the middle 80% of them.

    Args:
        curves: of `results.curves_of`, by method.
        measures: a panel each, where they are known.
        title: of the figure.
    """
    measures = [one for one in measures if all(one in table for table in curves.values())]
    with canvas(2.7 * len(measures), 2.8, len(measures)) as (figure, panels):
        for axes, measure in zip(panels, measures, strict=True):
            for name, table in curves.items():
                label, steps = name.replace("_", "-"), table["step"]
                colour = POLICY_COLOURS.get(label)
                band = table[f"{measure}_low"], table[f"{measure}_high"]
                axes.fill_between(steps, *band, alpha=0.2, color=colour, linewidth=0)
                axes.plot(steps, table[measure], color=colour, label=label)
            axes.set(xlabel="step", title=LABELS.get(measure, measure.replace("_", " ")))
        panels[0].legend(fontsize="small")
        notes = [title, "lines: means, bands: the middle 80% of policies"]
        figure.suptitle("; ".join(filter(None, notes)), fontsize=9)
        return figure


def return_distributions(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], unit: str, columns: int = 3
) -> Figure:
    """Draw densities of the policies' returns with a dot for every policy, a panel for each title.

    Args:
        panels: for each title the policies of `vanilla`, `variance_aware` and `reference`, with
            `true_reward`, its error and `kl`; variances are written as training + noise. The reference's
            mean is a bar, with two standard errors to each side, or an arrow where it lies far from all
            policies.
        unit: of the returns.
        columns: of panels.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with canvas(3.9 * columns, 3.1 * rows + 0.3, columns, rows) as (figure, places):
        for axes, (title, stacks) in zip(places, panels.items(), strict=False):
            _returns(axes, stacks)
            axes.set(title=title, xlabel=unit, yticks=[])
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        places[0].legend(fontsize="small", loc="upper left")
        return figure


def _returns(axes: Axes, stacks: Mapping[str, pd.DataFrame]) -> None:
    bar = stacks["reference"]["true_reward"]
    values = {name: stacks[name]["true_reward"].to_numpy() for name in ("vanilla", "variance_aware")}
    every = np.concatenate(list(values.values()))
    span = np.ptp(every) + 1e-9
    near = every.min() - span < bar.mean() < every.max() + span
    shown_values = np.append(every, bar.mean()) if near else every
    low, high = shown_values.min() - 0.15 * span, shown_values.max() + 0.15 * span
    places = np.linspace(low, high, 300)
    axes.set_xlim(low, high)
    if near:
        band = bar.mean() + np.array([-2, 2]) * bar.sem()
        axes.axvspan(*band, color=REFERENCE, alpha=0.25, linewidth=0)
        axes.axvline(bar.mean(), color=REFERENCE, linestyle="--", label="reference")
    else:
        _beyond(axes, f"reference {bar.mean():.3g}", right=bar.mean() > high)
    densities = {name: gaussian_kde(one)(places) for name, one in values.items()}
    top = max(density.max() for density in densities.values())
    lines = []
    for lane, (name, density) in enumerate(densities.items(), start=1):
        shown = name.replace("_", "-")
        colour = POLICY_COLOURS[shown]
        axes.fill_between(places, density, color=colour, alpha=0.2, linewidth=0)
        axes.plot(places, density, color=colour, label=shown)
        depth = np.full(values[name].size, -0.09 * lane * top)
        axes.scatter(values[name], depth, s=9, color=colour, alpha=0.5, linewidths=0)
        noise = (stacks[name]["true_reward_error"] ** 2).mean()
        rest = values[name].var(ddof=1) - noise
        lines.append(f"{shown}: variance {rest:.2g} + {noise:.2g}, KL {stacks[name]['kl'].mean():.2f}")
    axes.set_ylim(-0.26 * top, 1.35 * top)
    axes.text(0.99, 0.98, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _beyond(axes: Axes, text: str, right: bool) -> None:
    """Say what lies beyond the panel, and on which side."""
    x, arrow = (0.98, f"{text} \u2192") if right else (0.02, f"\u2190 {text}")
    axes.text(
        x, 0.7, arrow, transform=axes.transAxes, ha="right" if right else "left", fontsize=8, color=REFERENCE
    )


def ratio_forest(
    table: pd.DataFrame,
    printed: Mapping[Any, float] | None = None,
    pooled: Mapping[str, Ratio] | None = None,
    regime: str = "equal_mean_penalty",
) -> Figure:
    """Draw ratios of training variances with their intervals, one line for each comparison.

    Args:
        table: of `comparisons.Comparisons.table`.
        printed: the paper's ratios by row, marked beside the plain comparison of each row.
        pooled: further ratios by label, at the end.
        regime: of the penalty in the paper's rows.
    """
    labels = [_comparison_label(row) for row in table.to_dict("records")]
    with canvas(7.4, 0.32 * (len(table) + len(pooled or {})) + 1.6) as (figure, [axes]):
        places = np.arange(len(table))[::-1]
        for k, (label, ratio) in enumerate((pooled or {}).items(), start=1):
            axes.plot([ratio.low, ratio.high], [-k, -k], color="black", linewidth=2)
            axes.plot(ratio.value, -k, "D", color="black", markersize=5)
            labels.append(label)
        for sure in (True, False):
            chosen = (table["floored"] < Ratio.FLOORED).to_numpy() == sure
            known, rows = table.loc[chosen, "ratio"], table[chosen]
            axes.errorbar(
                known,
                places[chosen],
                xerr=np.stack([known - rows["ratio_low"], rows["ratio_high"] - known]),
                fmt="o",
                color=POLICY_COLOURS["variance-aware"] if sure else REFERENCE,
                markersize=4,
                label="measured" if sure else "noise of the evaluation too large",
            )
        marks = [
            ((printed or {})[row["row"]], place)
            for row, place in zip(table.to_dict("records"), places, strict=True)
            if row["row"] in (printed or {}) and _is_plain(row, regime)
        ]
        if marks:
            axes.scatter(*zip(*marks, strict=True), marker="x", color=PRINTED, label="the paper's", zorder=3)
        axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        axes.axvline(1, color=REFERENCE, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(0.1, 12)  # longer lines leave the panel
        axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set_yticks([*places, *-np.arange(1, len(labels) - len(places) + 1)], labels, fontsize=8)
        axes.set_xlabel("training variance, vanilla : variance-aware")
        return figure


def _is_plain(row: Mapping[Any, Any], regime: str) -> bool:
    """Whether a comparison is the plain one of its row."""
    return (
        (row["protocol"], row["regime"], row["widths"]) == ("shared", regime, "rescaled")
        and row["range"] in (0, 100)
        and row["disagreement"] == "none"
        and row["repeat"] == 0
    )


def _comparison_label(row: Mapping[Any, Any]) -> str:
    parts = [str(row["row"]), str(row["protocol"]), str(row["regime"]).replace("_", " ")]
    if row["range"] not in (0, 100):
        parts.append(f"1 to {row['range']}")
    if row["widths"] != "rescaled":
        parts.append("Table 4's widths")
    if row["disagreement"] != "none":
        parts.append(f"disagreement on {row['disagreement']}")
    if row["repeat"]:
        parts.append(f"stack {row['repeat'] + 1}")
    return ", ".join(parts)


def range_ratios(table: pd.DataFrame, printed: Mapping[int, float]) -> Figure:
    """Draw the ratio of training variances over the reward range, beside the paper's printed ones.

    At equal mean penalty rescaled intervals give the same policies in every range: a band, not points.

    Args:
        table: rows of `comparisons.Comparisons.table` of several ranges.
        printed: ratio by R.
    """
    colours = iter((EXACT, GRPO, PESSIMIST))
    with canvas(5.6, 3.6) as (figure, [axes]):
        for k, ((regime, widths), rows) in enumerate(table.groupby(["regime", "widths"], sort=False)):
            rows = rows.sort_values("range")
            name = str(regime).replace("_", " ").replace("as printed", "printed coefficients")
            if (regime, widths) == ("equal_mean_penalty", "rescaled"):
                one = rows.iloc[-1]
                axes.axhspan(one["ratio_low"], one["ratio_high"], color=REFERENCE, alpha=0.15)
                axes.axhline(one["ratio"], color=REFERENCE, label=f"{name}, the same in every range")
                continue
            name += "" if widths == "rescaled" else ", Table 4's widths"
            spans = [rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"]]
            axes.errorbar(
                rows["range"] * (1 + 0.03 * k), rows["ratio"], yerr=np.stack(spans), fmt="o-",
                capsize=2, label=name, color=next(colours),
            )  # fmt: skip
        axes.plot(list(printed), list(printed.values()), "x--", color=PRINTED, label="the paper's ratios")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="R, the upper end of the range",
                 ylabel="ratio of training variances")  # fmt: skip
        axes.set_xticks(list(printed), [str(top) for top in printed])
        axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.legend(fontsize="small")
        return figure


def interval_deviations(deviations: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    """Draw how the standard deviations of a judge's intervals vary over responses, by range.

    Args:
        deviations: for each kind of widths, by R, as shares of the scale's length.
    """
    with canvas(4.2 * len(deviations), 3.0, len(deviations)) as (figure, panels):
        for axes, (kind, by_range) in zip(panels, deviations.items(), strict=True):
            axes.boxplot(
                list(by_range.values()), tick_labels=[str(top) for top in by_range], showfliers=False
            )
            axes.set(title=kind, xlabel="R", ylabel="SD of U[a, b], share of R - 1")
        top = max(axes.get_ylim()[1] for axes in panels)
        for axes in panels:
            axes.set_ylim(0, top)
        return figure
