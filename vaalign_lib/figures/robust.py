"""Figures of notebook 07."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaalign_lib.figures import style
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean

NAMES = {"0.0": "minimum", "0.6": "robust, 0.6", "1.0": "nominal", "mean": "mean", "max": "maximum"}
COLOURS = dict(
    zip(NAMES, (style.SERIES[0], style.SERIES[1], style.VANILLA, style.GRPO, style.SERIES[3]), strict=True)
)
SIDES = {"traditional": style.VANILLA, "mean of heads": style.SERIES[1], "nominal": style.SERIES[3]}


def matrices(policies: Mapping[str, Array], told: str) -> Figure:
    """Draw probabilities of responses by prompt, a panel for each matrix (prompts, responses)."""
    highest = max(float(policy.max()) for policy in policies.values())
    with style.grid(len(policies), min(4, len(policies)), 7.4, 2.0) as (figure, panels):
        for axes, (name, policy) in zip(panels, policies.items(), strict=True):
            axes.imshow(policy, vmin=0, vmax=highest, cmap="Blues")
            axes.set_title(f"{fill(name, 24)}\ndiagonal {np.diag(policy).mean():.2f}", fontsize=style.SMALL)
            axes.set(xticks=[], yticks=[], xlabel="response")
            axes.grid(visible=False)
        panels[0].set_ylabel("prompt")
        style.headline(figure, f"{told}. White: probability 0, darkest: {highest:.2f}")
        return figure


def sweep(table: pd.DataFrame, seeds: int) -> Figure:
    """Draw robust minus mean and robust minus standard in every setting of the toy, of `toy_sweep`."""
    with style.canvas(7.4, 4.3, 1) as (figure, [axes]):
        places = style.lines_of(axes, table["setting"].tolist())
        for shift, (column, name, colour) in enumerate(
            (
                ("over_mean", "minus the mean of the same four", style.SERIES[1]),
                ("over_standard", "minus standard (one model)", style.SERIES[3]),
            )
        ):
            style.forest(axes, table, places + 0.14 - 0.28 * shift, column, colour, label=f"robust {name}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("share of prompts found, difference; 95% intervals over seeds")
        above = int((table["over_mean_low"] > 0).sum())
        below = int((table["over_mean_high"] < 0).sum())
        style.headline(
            figure,
            f"Against the mean of the same four models robust finds more in {above}, less in {below} of "
            f"{len(table)} settings ({seeds} seeds each)",
        )
        style.legend_outside(figure, axes, 2)
        return figure


def coverage(sides: Mapping[str, tuple[Array, Array]], areas: Mapping[str, Estimate]) -> Figure:
    """Draw chosen against rejected rewards (pairs,) of every model, standardized together (Figure 6)."""
    with style.grid(len(sides), len(sides), 7.4, 2.7, sharex=True, sharey=True) as (figure, panels):
        for axes, (name, (chosen, rejected)) in zip(panels, sides.items(), strict=True):
            pooled = np.concatenate([chosen, rejected])
            x, y = ((one - pooled.mean()) / pooled.std() for one in (chosen, rejected))
            axes.scatter(x, y, s=4, color=SIDES[name], alpha=0.3, linewidths=0, rasterized=True)
            axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
            area = str(areas[name]).replace(" [", "\n[")
            axes.set(title=f"{name}\narea {area}", xlabel="chosen")
        panels[0].set_ylabel("rejected")
        first, *others = sides
        told = ", ".join(f"{areas[one].value / areas[first].value:.3g} times ({one})" for one in others)
        style.headline(
            figure,
            f"The ellipse that chosen and rejected rewards cover, over that of {first}: {told}. Rewards in "
            "deviations of all of a model, first seed; areas: means over seeds with 95% intervals",
        )
        return figure


def scoring(margins: Mapping[str, Array], gaps: Mapping[str, Array]) -> Figure:
    """Draw margins (pairs,) and gaps to gold (responses,), of Figures 8, 5b and 7, all standardized."""
    with style.canvas(7.4, 3.3, 2) as (figure, [left, right]):
        for axes, parts, unit in (
            (left, margins, "chosen minus rejected"),
            (right, gaps, "reward minus gold"),
        ):
            edges = np.linspace(-5, 5, 61)
            for k, (name, values) in enumerate(parts.items()):
                colour = SIDES.get(name, style.SERIES[2 * k])
                style.shares(axes, values.clip(-5, 5), edges, colour, label=name)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(xlabel=f"{unit}, deviations", yticks=[])
        left.set_title(
            "Margin (Figure 8): means " + " and ".join(f"{one.mean():.2f}" for one in margins.values())
        )
        under = [f"{(one < 0).mean():.0%}" for one in gaps.values()]
        right.set_title("Gap to gold (Figures 5b, 7)")
        for axes in (left, right):
            axes.legend(loc="upper left")
        told = " and ".join(f"{name} {share}" for name, share in zip(gaps, under, strict=True))
        style.headline(figure, f"Responses that are scored below gold, all rewards standardized: {told}")
        return figure


def sigma(paths: Mapping[str, Array], texts: Sequence[str]) -> Figure:
    """Draw trained deviations over steps, the mean over seeds, of paths (steps, seeds, texts) by loss."""
    with style.grid(len(paths), len(paths), 7.4, 2.9) as (figure, panels):
        for axes, (loss, path) in zip(panels, paths.items(), strict=True):
            for k, text in enumerate(texts):
                axes.plot(path[..., k].mean(1), color=style.SERIES[k], label=text)
            ends = path[-1].mean(0)
            axes.set(
                title=f"{loss}\nat the end " + ", ".join(f"{one:.2f}" for one in ends), xlabel="step", ylim=0
            )
        panels[0].set_ylabel("trained deviation")
        style.headline(
            figure,
            "Deviation that is trained for noisy labels over that for quiet ones, at the end: "
            + ", ".join(
                f"{np.exp(np.log(p[-1, :, 1] / p[-1, :, 0]).mean()):.2f} ({name})"
                for name, p in paths.items()
            ),
        )
        style.legend_outside(figure, panels[0], len(texts))
        return figure


def _with_intervals(table: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    rows = [{by: name, **mean(part[column]).columns("value")} for name, part in table.groupby(by, sort=False)]
    return pd.DataFrame(rows)


def lambdas(tables: Mapping[str, pd.DataFrame], start: float, told: str) -> Figure:
    """Draw gold over lambda, a panel for each title, of policies after short and long training (Figure 3)."""
    with style.grid(len(tables), len(tables), 7.4, 3.1, sharey=True) as (figure, panels):
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            numbers = table[~table["rule"].isin(["mean", "max"])]
            for k, (step, part) in enumerate(numbers.groupby("step")):
                rows = _with_intervals(part.assign(rule=part["rule"].astype(float)), "rule", "gold")
                style.band(
                    axes,
                    rows.sort_values("rule"),
                    "rule",
                    "value",
                    style.SERIES[k],
                    label=f"{step} steps",
                    marker="o",
                )
            axes.axhline(start, color=style.REFERENCE, linestyle="--")
            last = numbers[numbers["step"] == numbers["step"].max()].groupby("rule")["kl"].mean()
            axes.set(
                title=f"{title}\nKL {last.min():.2f} to {last.max():.2f} nats",
                xlabel="lambda (1: nominal, 0: lowest)",
            )
        panels[0].set_ylabel("gold, SDs of the corpus")
        style.headline(figure, told)
        style.legend_outside(figure, panels[0], 2)
        return figure


def over_training(table: pd.DataFrame, start: float, told: str) -> Figure:
    """Draw gold and KL over steps by rule, means over ensembles with intervals (Figures 4a, 5a, 10)."""
    with style.canvas(7.4, 3.6, 2) as (figure, [gold, kl]):
        for k, (rule, name) in enumerate(NAMES.items()):
            mine = table[table["rule"] == rule]
            for axes, column in ((gold, "gold"), (kl, "kl")):
                rows = _with_intervals(mine, "step", column).sort_values("step")
                look: Any = {"fmt": "o-", "color": COLOURS[rule], "label": name, "markersize": 3}
                look |= {"linewidth": 1, "elinewidth": 0.8}
                beside = rows["step"] + 0.012 * rows["step"].max() * (k - 2)  # so that intervals can be told
                axes.errorbar(beside, rows["value"], style.spans(rows, "value"), **look)
        gold.axhline(start, color=style.REFERENCE, linestyle="--", label="reference")
        gold.set(xlabel="step", ylabel="gold, SDs of the corpus")
        kl.set(xlabel="step", ylabel="KL to the reference, nats")
        style.headline(figure, told)
        style.legend_outside(figure, gold, 6)
        return figure


def stochastic(table: pd.DataFrame, told: str) -> Figure:
    """Draw KL and gold over steps under rewards that say nothing, a column for each critic (Figure 4b)."""
    stacks = list(table["stack"].unique())
    kinds = list(table["rule"].str.partition(",")[0].unique())
    with style.canvas(7.4, 5.2, len(stacks), 2, sharex=True) as (figure, panels):
        for k, stack in enumerate(stacks):
            for j, (rule, part) in enumerate(table[table["stack"] == stack].groupby("rule", sort=False)):
                plain, kind = "beta 0.2" in str(rule), j % len(kinds)
                line: Any = {"linestyle": "-" if plain else ":", "label": rule, "color": style.SERIES[kind]}
                line |= {"linewidth": 3.0 / 1.35**kind}  # ever thinner, so that equal lines show below
                for axes, column in ((panels[k], "kl"), (panels[len(stacks) + k], "gold")):
                    rows = part.groupby("step", as_index=False)[column].mean()
                    axes.plot(rows["step"], rows[column], **line)
            panels[k].set_title(stack.removeprefix("stochastic, "))
            panels[k].set_yscale("symlog", linthresh=1e-3)
            panels[len(stacks) + k].axhline(table["start"].iloc[0], color=style.REFERENCE, linestyle="--")
            panels[len(stacks) + k].set_xlabel("step")
        _ylabels([panels[0], panels[len(stacks)]], ["KL, nats", "gold, corpus SDs\n(dashed: reference)"])
        style.headline(figure, told)
        style.legend_outside(figure, panels[0], 2)
        return figure


def _ylabels(panels: Sequence[Axes], names: Sequence[str]) -> None:
    for axes, name in zip(panels, names, strict=True):
        axes.set_ylabel(name)


def bench(gains: Mapping[str, Estimate], signals: Mapping[str, Estimate], told: str) -> Figure:
    """Draw each method's gain in gold and ln (gain / SD)^2, minus those of one judge alone."""
    with style.canvas(7.4, 3.2, 2) as (figure, panels):
        for axes, found, unit in zip(
            panels, (gains, signals), ("gain in gold", "ln (gain / SD)²"), strict=True
        ):
            rows = pd.DataFrame([one.columns("value") for one in found.values()])
            style.forest(axes, rows, style.lines_of(axes, list(found)), "value", style.SERIES[0])
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"{unit}, minus one judge's")
        panels[1].tick_params(labelleft=False)
        style.headline(figure, f"{told}; 95% intervals over worlds")
        return figure


def fusion(table: pd.DataFrame, start: float, told: str) -> Figure:
    """Draw gold of every way to fuse sources, means over policies; `start`: the reference's gold."""
    with style.canvas(7.2, 3.0) as (figure, [axes]):
        rows = _with_intervals(table, "rule", "gold")
        style.forest(axes, rows, style.lines_of(axes, rows["rule"].tolist()), "value", style.SERIES[0])
        axes.axvline(start, color=style.REFERENCE, linestyle="--")
        axes.set_xlabel("gold, SDs of the corpus; 95% intervals over policies; dashed: the reference")
        style.headline(figure, told)
        return figure
