"""Figures of notebook 09."""

from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures import style

MARKS = {"ppo": "o", "rloo": "s", "grpo": "^"}


def one_token(ends: pd.DataFrame) -> Figure:
    """Draw where each trainer converged on one token, over where it was said to (of `trl.one_token_ends`)."""
    names = list(ends["trainer"].unique())
    off = (ends["trained"] - ends["expected"]).abs().groupby(ends["trainer"]).sum() / 2
    with style.grid(len(names), 3, 6.8, 2.4, sharey=True) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            one = ends[ends["trainer"] == name]
            axes.bar(one["word"], one["expected"], color="0.82", label="fixed point")
            axes.plot(one["word"], one["reference"], "_", color=style.REFERENCE, ms=11, label="reference")
            axes.plot(one["word"], one["trained"], "o", color=style.EXACT, ms=4.5, label="trained")
            title = fill(f"{name}: distance {off[name]:.3f}", 24)
            axes.set(title=title, xlabel="completion", xticks=one["word"])
        panels[0].set_ylabel("probability")
        told = f"Each trainer ends within {off.max():.3f} of its own fixed point (total variation distance)"
        style.headline(figure, told)
        style.legend_outside(figure, panels[0], 3)
        return figure


def comparison(log: pd.DataFrame, policies: pd.DataFrame, reference: float, window: int = 10) -> Figure:
    """Draw rewards over training, and the gold reward over the KL that training left.

    `log`: of `trl.table_of`, a row for each policy and step; `policies`: the same, a row for each policy as
    it was evaluated; `reference`: gold reward of the policy that they start from; `window`: steps of the
    running mean.
    """
    algorithms = list(log["algorithm"].unique())
    count = policies.groupby(["algorithm", "objective"]).size().max()
    with style.grid(len(algorithms) + 1, 2, 6.8, 2.6) as (figure, [*panels, last]):
        for axes, algorithm in zip(panels, algorithms, strict=True):
            for objective, name in style.METHODS.items():
                mine = log[(log["algorithm"] == algorithm) & (log["objective"] == objective)]
                table = mine.pivot(index="step", columns="policy", values="reward").rolling(window, 1).mean()
                spread = table.agg(["mean", "min", "max"], axis=1).set_axis(["reward", "low", "high"], axis=1)
                style.band(axes, spread.reset_index(), "step", "reward", style.POLICY_COLOURS[name])
            axes.set(title=algorithm.upper(), xlabel="step", ylabel="reward, SDs of\nthe reference")
        for (algorithm, objective), one in policies.groupby(["algorithm", "objective"], sort=False):
            name = style.METHODS[str(objective)]
            settings: Any = {"color": style.POLICY_COLOURS[name], "ms": 5.5}
            label = f"{str(algorithm).upper()}, {name}"
            last.plot(one["kl"], one["gold"], MARKS[str(algorithm)], label=label, **settings)
        last.axhline(reference, color=style.REFERENCE, ls="--", lw=1, label="reference")
        last.set(title="as evaluated", xlabel="KL to the reference, nats", ylabel="gold, SDs of the corpus")
        gold = policies.groupby(["algorithm", "objective"])["gold"].mean().unstack() - reference
        gains = ", ".join(
            f"{str(name).upper()} {row['vanilla']:+.2f} and {row['variance_aware']:+.2f}"
            for name, row in gold.loc[algorithms].iterrows()
        )
        told = f"{count} policies of each (bands: smallest to largest, mean of {window} steps)"
        style.headline(figure, f"Gold gained over the reference, vanilla and variance-aware: {gains}; {told}")
        style.legend_outside(figure, last, 3)
        return figure
