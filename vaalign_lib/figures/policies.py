"""Figures of policies in training."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import gaussian_kde

from vaalign_lib.figures import style
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.returns import Ratio
from vaalign_lib.statistics.tests import Estimate

WIDTHS = {"as Table 4's second column": "widths of Table 4"}
UNKNOWN = "not determinable"
LABELS = {
    "reward": "reward, SDs of the reference",
    "gold": "gold reward, SDs of the corpus",
    "true_reward": "true reward, the source's unit",
    "kl": "KL to the reference, nats",
    "log_ratio": "log ratio, as trl logs it, nats",
    "length": "tokens of a response",
    "variance": "variance of the reward, 1 = reference",
}


def learning_curves(
    curves: Mapping[str, pd.DataFrame],
    measures: Sequence[str] = ("reward", "gold", "log_ratio", "length"),
    title: str = "",
) -> Figure:
    """Draw mean curves over policies, with the middle 80% of them.

    `curves`: of `results.curves_of`, by method; `measures`: a panel each, where they are known; `title`:
    what is trained, and how many policies.
    """
    measures = [one for one in measures if all(one in table for table in curves.values())]
    with style.grid(len(measures), 2, 6.6, 2.5) as (figure, panels):
        for axes, measure in zip(panels, measures, strict=True):
            for name, table in curves.items():
                shown = style.METHODS.get(name, name)
                style.band(
                    axes,
                    table,
                    "step",
                    measure,
                    style.POLICY_COLOURS.get(shown, style.SERIES[0]),
                    label=shown,
                )
            axes.set(xlabel="step", title=LABELS.get(measure, measure.replace("_", " ")))
        last = [
            f"{t[measures[0]].iloc[-1]:.2f} ({style.METHODS.get(name, name)})" for name, t in curves.items()
        ]
        found = (
            f"{LABELS[measures[0]]}: at the end {' and '.join(last)}; means, and the middle 80% of policies"
        )
        style.headline(figure, f"{title}\n{found}" if title else found)
        style.legend_outside(figure, panels[0], len(curves))
        return figure


def return_distributions(
    panels: Mapping[str, Mapping[str, pd.DataFrame]],
    unit: str | Mapping[str, str],
    ratios: Mapping[str, Estimate],
    outcome: str = "gold",
) -> Figure:
    """Draw densities of the policies' returns with a dot for every policy, a panel for each title.

    `panels`: for each title the policies of `vanilla`, `variance_aware` and `reference`, with the
    `outcome`, its error if it has one, and `kl`; variances are written as training + noise. The
    reference's mean is a bar, with two standard errors to each side, or an arrow where it lies far from all
    policies; `unit`: of the returns; by title where they differ; `ratios`: of training variances, vanilla's
    over variance-aware's, by title.
    """
    with style.grid(len(panels), min(2, len(panels)), 7.4 if len(panels) > 1 else 5.6, 2.9) as (
        figure,
        places,
    ):
        units = dict.fromkeys(panels, unit) if isinstance(unit, str) else dict(unit)
        reach = {title: _reach(stacks, outcome) for title, stacks in panels.items()}
        for axes, (title, stacks) in zip(places, panels.items(), strict=True):
            alike = np.array([ends for one, ends in reach.items() if units[one] == units[title]])
            _returns(axes, stacks, outcome, (alike[:, 0].min(), alike[:, 1].max()))
            axes.set_title(f"{title}\nratio {ratios[title]}".replace("; ", ";\n"))
            axes.set(xlabel=units[title], yticks=[])
        count = len(next(iter(panels.values()))["vanilla"])
        style.headline(
            figure,
            f"{_verdicts([ratios[title] for title in panels])}; {count} policies each. Ratio: vanilla's "
            "over variance-aware's. Numbers: training + noise.",
        )
        widest = max(places, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
        style.legend_outside(figure, widest, 3)
        return figure


def _verdicts(ratios: Sequence[Estimate]) -> str:
    """Return in words in how many comparisons which method's training variance is the lower one."""
    found = [_verdict(ratio) for ratio in ratios]
    if len(found) == 1:
        alone = {"open": "may be lower or higher than vanilla's", UNKNOWN: f"over vanilla's is {UNKNOWN}"}
        return f"Variance-aware training variance {alone.get(found[0], f'is {found[0]}')}"
    names = ("clearly lower", "clearly higher", "open", UNKNOWN)
    told = [f"{name} in {found.count(name)}" for name in names if name in found]
    return f"Variance-aware training variance: {', '.join(told)} of {len(found)} comparisons"


def _verdict(ratio: Estimate) -> str:
    if isinstance(ratio, Ratio) and not ratio.measurable:
        return UNKNOWN
    return "clearly lower" if ratio.low > 1 else "clearly higher" if ratio.high < 1 else "open"


def _reach(stacks: Mapping[str, pd.DataFrame], outcome: str) -> tuple[float, float]:
    """Return the ends of an axis for the policies, and for the reference unless it is far from all."""
    bar = stacks["reference"][outcome].mean()
    every = np.concatenate([stacks[name][outcome].to_numpy() for name in style.METHODS])
    span = np.ptp(every) + 1e-9
    near = every.min() - span < bar < every.max() + span
    within = np.append(every, bar) if near else every
    return within.min() - 0.15 * span, within.max() + 0.15 * span


def _returns(
    axes: Axes, stacks: Mapping[str, pd.DataFrame], outcome: str, limits: tuple[float, float]
) -> None:
    bar, (low, high) = stacks["reference"][outcome], limits
    values = {name: stacks[name][outcome].to_numpy() for name in style.METHODS}
    places = np.linspace(low, high, 300)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if low < bar.mean() < high:
        half = 2 * bar.sem()
        axes.axvspan(bar.mean() - half, bar.mean() + half, color=style.REFERENCE, alpha=0.25, linewidth=0)
        axes.axvline(bar.mean(), color=style.REFERENCE, linestyle="--", label="reference")
    elif bar.mean() > high:
        style.note(axes, f"reference {bar.mean():.3g} \u2192", "upper right", style.REFERENCE, line=4)
    else:
        style.note(axes, f"\u2190 reference {bar.mean():.3g}", "upper left", style.REFERENCE, line=4)
    densities = {name: gaussian_kde(one)(places) for name, one in values.items()}
    top = max(density.max() for density in densities.values())
    for lane, (name, density) in enumerate(densities.items()):
        shown, colour = style.METHODS[name], style.POLICY_COLOURS[style.METHODS[name]]
        axes.fill_between(places, density, color=colour, alpha=0.2, linewidth=0)
        axes.plot(places, density, color=colour, label=shown)
        depth = np.full(values[name].size, -0.09 * (lane + 1) * top)
        axes.scatter(values[name], depth, s=9, color=colour, alpha=0.5, linewidths=0)
        noise = float(np.mean(stacks[name].get(f"{outcome}_error", np.zeros(1)) ** 2))
        rest = values[name].var(ddof=1) - noise
        style.note(
            axes, f"{rest:.2g} + {noise:.2g}, KL {stacks[name]['kl'].mean():.2f}", colour=colour, line=lane
        )
    axes.set_ylim(-0.26 * top, 1.5 * top)


def range_ratios(table: pd.DataFrame, printed: Mapping[int, float]) -> Figure:
    """Draw the ratio of training variances over the reward range, beside the paper's printed ones.

    At equal mean penalty rescaled intervals give the same policies in every range: a band, not points.
    Ratios that do not stand out from the noise of the evaluation are open marks.

    `table`: rows of `comparisons.Comparisons.table` of several ranges; `printed`: ratio by R.
    """
    found = ""
    with style.canvas(6.0, 4.6) as (figure, [axes]):
        for k, ((regime, widths), rows) in enumerate(table.groupby(["regime", "widths"], sort=False)):
            rows = rows.sort_values("range")
            sure = rows["floored"] < Ratio.FLOORED
            words = str(regime).replace("_", " ")
            name = style.REGIMES.get(words, words)
            name = name[0].lower() + name[1:]
            if (regime, widths) == ("equal_mean_penalty", "rescaled"):
                one = rows.iloc[-1]
                axes.axhspan(one["ratio_low"], one["ratio_high"], color=style.REFERENCE, alpha=0.15)
                name += ", the same in every range" + ("" if sure.iloc[-1] else f": {UNKNOWN}")
                line = "-" if sure.iloc[-1] else ":"
                axes.axhline(one["ratio"], color=style.REFERENCE, linestyle=line, label=name)
                continue
            if (regime, widths) == ("printed_fixed", "rescaled"):
                told = rows["ratio"].map(style.times).where(sure, UNKNOWN).iloc[[0, -1]].unique()
                found = f"; here, with the printed coefficient fixed, {' and '.join(told)}"
            name += "" if widths == "rescaled" else ", Table 4's widths"
            rows, colour = rows.assign(range=rows["range"] * 1.03**k), style.SERIES[k % len(style.SERIES)]
            style.determinable(axes, rows, "range", "ratio", sure, colour, name)
        axes.plot(
            list(printed), list(printed.values()), "x--", color=style.PRINTED, label="the paper's ratios"
        )
        style.octaves(axes, "y", [*np.concatenate(style.ends(table, "ratio")), *printed.values()])
        style.log_ticks(axes, "x", sorted(printed))
        axes.set(xlabel="R, upper end of the range", ylabel="training variance,\nvanilla : variance-aware")
        narrow, wide = min(printed), max(printed)
        said = f"in the paper {printed[narrow]:.2f} and {printed[wide]:.2f}"
        style.headline(figure, f"Ratio at R = {narrow} and {wide}: {said}{found}; 95% intervals")
        style.legend_outside(figure, axes, 1)
        return figure


def interval_deviations(deviations: Mapping[str, Mapping[int, Array]]) -> Figure:
    """Draw how the standard deviations of a judge's intervals vary over responses, by range.

    Ranges in which they are the same share one box.

    `deviations`: for each kind of widths, by R, as shares of the scale's length.
    """
    boxes, told = {}, []
    for kind, by_range in ((WIDTHS.get(one, one), tops) for one, tops in deviations.items()):
        spreads = [float(values.std(ddof=1)) for values in by_range.values()]
        if np.ptp(spreads) < 1e-9:
            boxes[f"{kind},\nevery R"] = next(iter(by_range.values()))
            told.append(f"{kind} {spreads[0]:.3f} in every range")
        else:
            boxes |= {f"{kind},\nR = {top}": values for top, values in by_range.items()}
            by_top = [f"{one:.3f} (R = {top})" for top, one in zip(by_range, spreads, strict=True)]
            told.append(f"{kind} {', '.join(by_top)}")
    with style.canvas(max(1.45 * len(boxes), 4), 3.5) as (figure, [axes]):
        medians = {"color": style.SERIES[0]}
        axes.boxplot(list(boxes.values()), tick_labels=list(boxes), showfliers=False, medianprops=medians)
        axes.tick_params(axis="x", labelsize=style.SMALL)
        axes.set(ylabel="SD of U[a, b], share of R - 1", ylim=(0, None))
        style.note(axes, f"n = {len(next(iter(boxes.values())))} responses", "upper left")
        style.headline(
            figure, f"How much the uncertainty varies over responses (SD of the SD): {'; '.join(told)}"
        )
        return figure
