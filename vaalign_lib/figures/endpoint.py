"""Figures of notebook 04's protocol: the endpoint by world, what makes policies vary, what they write."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures import style
from vaalign_lib.statistics.returns import Ratio
from vaalign_lib.statistics.tests import Estimate, mean

COLOURS = {"vanilla": style.VANILLA, "variance_aware": style.AWARE, "placebo": style.SERIES[5]}
WORDS = style.METHODS | {"placebo": "placebo"}


def endpoint(tables: Mapping[str, pd.DataFrame], pooled: Mapping[str, Estimate]) -> Figure:
    """Draw ratios of variance per squared gain, a line for each world and comparison, and the mean.

    `tables`: of `experiments.endpoint.by_world`, by what is compared; `pooled`: over worlds. Thin intervals
    are over the policies of a world, thick ones over worlds.
    """
    lines = sum(len(one) + 1 for one in tables.values()) + len(tables)
    with style.canvas(7.2, 0.3 * lines + 1.9) as (figure, [axes]):
        names, groups = [], []
        for title, table in tables.items():
            names += [f"world {world}" for world in table["world"]] + ["mean over worlds"]
            groups += [title] * (len(table) + 1)
        places, first = style.lines_of(axes, names, groups), 0
        for title, table in tables.items():
            own, at = places[first : first + len(table)], places[first + len(table)]
            shown = np.exp(table[["log_ratio", "log_ratio_low", "log_ratio_high"]])
            style.forest(axes, shown, own, "log_ratio", style.REFERENCE, linewidth=1)
            mean = pooled[title]
            row = pd.DataFrame(
                [{"value": np.exp(mean.value), "low": np.exp(mean.low), "high": np.exp(mean.high)}]
            )
            style.forest(
                axes, row, np.array([at]), "value", style.AWARE, fmt="D", markersize=7, linewidth=2.4
            )
            first += len(table) + 1
        reach = [np.exp(one[["log_ratio_low", "log_ratio_high"]].to_numpy()) for one in tables.values()]
        low, high = min(0.45, *(one.min() for one in reach)), max(2.2, *(one.max() for one in reach))
        style.octaves(axes, "x", [low, high], most=np.inf)
        axes.set_xlabel("variance of gold per squared gain, as a multiple of variance-aware's")
        told = "; ".join(
            f"{title}: {np.exp(one.value):.2f} [{np.exp(one.low):.2f}, {np.exp(one.high):.2f}]"
            for title, one in pooled.items()
        )
        style.headline(figure, f"At equal KL, mean over worlds with its interval over worlds:\n{told}")
        return figure


def made_by(table: pd.DataFrame) -> Figure:
    """Draw what the judge and what training makes of the variance over policies, by world and method."""
    worlds = list(table["world"].unique())
    with style.grid(
        len(worlds), min(4, len(worlds)), max(2.1 * min(4, len(worlds)), 4.2), 2.6, sharey=True
    ) as (figure, panels):
        for axes, world in zip(panels, worlds, strict=True):
            part = table[table["world"] == world]
            for k, (method, rows) in enumerate(part.groupby("method", sort=False)):
                at = np.arange(len(rows)) + 0.36 * (k - 0.5)
                axes.bar(at, rows["variance"], 0.34, color=COLOURS[method], label=WORDS[method])
                axes.errorbar(
                    at, rows["variance"], style.spans(rows, "variance"), fmt="none", color="black", lw=1
                )
            axes.set_xticks(range(2), ["by the judge", "by training"])
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(f"world {world}")
        panels[0].set_ylabel("variance of gold over policies")
        style.headline(
            figure,
            f"Variance over policies, vanilla's over variance-aware's: made by the judge "
            f"{_times_as_much(table, 'judge')}; by training {_times_as_much(table, 'training')} "
            f"(worlds: {len(worlds)}; bars' intervals over policies)",
        )
        style.legend_outside(figure, panels[0], 2)
        return figure


def _times_as_much(table: pd.DataFrame, part: str) -> str:
    """Return vanilla's part over variance-aware's in words, with Student's interval over worlds of the
    logarithm: none where the latter may be zero.
    """
    rows = table[table["made_by"] == part].pivot(index="world", columns="method")
    least, aware = rows["variance_low", "variance_aware"], rows["variance", "variance_aware"]
    if least.mean() <= 0 or aware.min() <= 0:
        return "not determinable, as the latter may be 0"
    logs = np.log(rows["variance", "vanilla"] / aware)
    told = f"{style.times(np.exp(logs.mean()))} times"
    if len(logs) == 1:
        return told
    ratio = mean(logs)
    return f"{told} ({style.times(np.exp(ratio.low))} to {style.times(np.exp(ratio.high))})"


def written(policies: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """Draw the policies' gold against the mean variance of what they write, a panel for each world."""
    worlds = list(policies["world"].unique())
    with style.grid(len(worlds), min(2, len(worlds)), 7.2, 2.7) as (figure, panels):
        for axes, world in zip(panels, worlds, strict=True):
            for line, (method, part) in enumerate(
                policies[policies["world"] == world].groupby("method", sort=False)
            ):
                axes.scatter(
                    part["variance"], part["gold"], s=9, color=COLOURS[method], alpha=0.6, label=WORDS[method]
                )
                known = correlations[
                    (correlations["world"] == world) & (correlations["method"] == method)
                ].iloc[0]
                told = f"r = {known['correlation']:.2f} [{known['low']:.2f}, {known['high']:.2f}]"
                style.note(axes, told, colour=COLOURS[method], line=line)
            axes.set(xlabel="mean variance of its responses", title=f"world {world}")
        panels[0].set_ylabel("gold")
        means = correlations.groupby("method", sort=False)["correlation"].mean()
        told = ", ".join(f"{value:.2f} ({WORDS[method]})" for method, value in means.items())
        style.headline(
            figure,
            f"Policies that write what is disputed have less gold: mean correlation {told}"
            if (means < 0).all()
            else f"Gold and the variance of what policies write: mean correlation {told}",
        )
        style.legend_outside(figure, panels[0], 3)
        return figure


def on_the_way(table: pd.DataFrame) -> Figure:
    """Draw gain and risk by step of training, of `experiments.endpoint.on_the_way`."""
    with style.canvas(7.4, 3.6, 2) as (figure, [gain, risk]):
        for method, part in table.groupby("method", sort=False):
            shown: Any = {"color": COLOURS[method], "label": WORDS[method]}
            gain.plot(part["step"], part["gain_in_sds"], "o-", **shown)
            risk.errorbar(part["step"], part["risk"], style.spans(part, "risk"), fmt="o-", capsize=2, **shown)
        for axes in (gain, risk):
            style.log_ticks(axes, "x", sorted(table["step"].unique()), lambda step: f"{step:g}")
            axes.set_xlabel("steps of training")
        gain.axhline(0, color="black", linewidth=0.8)
        gain.set(title="mean gain in gold, SDs over policies")
        risk.set(title="share of policies at or below the reference")
        style.percent(risk.yaxis)
        risks = table.pivot(index="step", columns="method", values="risk")
        step = (risks["vanilla"] - risks["variance_aware"]).abs().idxmax()
        told = ", ".join(f"{risk:.0%} ({WORDS[name]})" for name, risk in risks.loc[step].items())
        style.headline(
            figure, f"The risks of vanilla and variance-aware are farthest apart after {step:g} steps: {told}"
        )
        style.legend_outside(figure, gain, 3)
        return figure


def controllers(curves: Mapping[str, Mapping[str, pd.DataFrame]], target: float) -> Figure:
    """Draw the coefficient and the log ratio it controls over training with the printed coefficients.

    `curves`: of `results.curves_of`, by regime in words and method; `target`: of the controller, nats.
    """
    with style.canvas(2.7 * len(curves), 5.2, len(curves), 2, sharex=True, sharey="row") as (figure, panels):
        for k, (regime, methods) in enumerate(curves.items()):
            for method, table in methods.items():
                shown: Any = {"color": COLOURS[method], "label": WORDS[method]}
                panels[k].plot(table["step"], table["coefficient"].clip(lower=1e-6), **shown)
                style.band(panels[len(curves) + k], table, "step", "log_ratio", COLOURS[method])
            panels[k].set_title(regime)
            style.plain_log(panels[k], "y")
            panels[len(curves) + k].axhline(target, color="black", linestyle=":", linewidth=1)
            panels[len(curves) + k].set_xlabel("step")
        panels[0].set_ylabel("coefficient of the penalty")
        panels[len(curves)].set_ylabel("log ratio, nats\n(dotted: printed target)")
        ends = [
            f"{regime} {max(table['coefficient'].iloc[-1] for table in methods.values()):.3g}"
            for regime, methods in curves.items()
        ]
        style.headline(figure, f"Largest coefficient at the end: {'; '.join(ends)}")
        style.legend_outside(figure, panels[0], 2)
        return figure


def strengths(table: pd.DataFrame) -> Figure:
    """Draw ratios of training variances against how much stronger the variance-aware penalty starts.

    `table` has `strength`, `ratio` with its interval, `floored`, `range` and `regime`; ratios that do not
    stand out from the noise of the evaluation are open circles.
    """
    with style.canvas(6.4, 4.0) as (figure, [axes]):
        beside = 1.06 ** np.arange(table["regime"].nunique())  # marks of equal strength stand side by side
        for k, (regime, rows) in enumerate(table.groupby("regime", sort=False)):
            colour = style.SERIES[k % len(style.SERIES)]
            rows = rows.assign(strength=rows["strength"] * beside[k]).sort_values("strength")
            sure = rows["floored"] < Ratio.FLOORED
            style.determinable(axes, rows, "strength", "ratio", sure, colour, str(regime))
            side: Any = {"offset": (6, 8), "ha": "left"} if k else {"offset": (-6, 8), "ha": "right"}
            white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            for x, y, top in zip(rows["strength"], rows["ratio"], rows["range"], strict=True):
                style.label(axes, x, y, f"R = {top:g}", colour, bbox=white, **side)
        style.plain_log(axes, "x")
        style.octaves(axes, "y", np.stack(style.ends(table, "ratio")))
        axes.margins(x=0.15)  # for the names of the last points
        axes.set(
            xlabel="mean weight of the variance-aware penalty, vanilla's = 1",
            ylabel="training variance of gold,\nvanilla : variance-aware",
        )
        clear = (table["floored"] < Ratio.FLOORED).sum()
        style.headline(
            figure,
            f"Penalties {table['strength'].min():.2g} to {table['strength'].max():.3g} times vanilla's: in "
            f"{clear} of {len(table)} comparisons training variances stand out from the evaluation's noise "
            "(filled)",
        )
        style.legend_outside(figure, axes, 2)
        return figure
