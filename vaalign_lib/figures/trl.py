"""Figures of notebook 09."""

import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures.style import AWARE, EXACT, REFERENCE, VANILLA, canvas

COLOURS = {"vanilla": VANILLA, "variance_aware": AWARE}
MARKS = {"ppo": "o", "rloo": "s", "grpo": "^"}


def one_token(ends: pd.DataFrame) -> Figure:
    """Draw where each trainer converged on one token, over where it was said to.

    Args:
        ends: of `trl.one_token_ends`.
    """
    names = list(ends["trainer"].unique())
    with canvas(2.5 * len(names), 3.1, len(names)) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            one = ends[ends["trainer"] == name]
            axes.bar(one["word"], one["expected"], color="0.82", label="fixed point")
            axes.plot(one["word"], one["reference"], "_", color=REFERENCE, ms=12, label="reference")
            axes.plot(one["word"], one["trained"], "o", color=EXACT, ms=4.5, label="trained")
            title = "\n".join(name.rsplit(", ", 1))
            axes.set(title=title, xlabel="completion", ylim=(0, 1.1 * ends["expected"].max()))
            axes.set_xticks(one["word"])
        panels[0].set_ylabel("probability")
        panels[0].legend(fontsize="small")
        return figure


def comparison(log: pd.DataFrame, policies: pd.DataFrame, reference: float, window: int = 10) -> Figure:
    """Draw rewards over training, and the gold reward over the KL that training left.

    Args:
        log: of `trl.table_of`, a row for each policy and step.
        policies: the same, a row for each policy as it was evaluated.
        reference: gold reward of the policy that they start from.
        window: steps of the running mean.
    """
    algorithms = list(log["algorithm"].unique())
    with canvas(2.9 * (len(algorithms) + 1), 3.0, len(algorithms) + 1) as (figure, panels):
        for axes, algorithm in zip(panels, algorithms, strict=False):
            for objective, colour in COLOURS.items():
                mine = log[(log["algorithm"] == algorithm) & (log["objective"] == objective)]
                for _, one in mine.groupby("policy"):
                    smooth = one["reward"].rolling(min(window, len(one))).mean()
                    axes.plot(one["step"], smooth, color=colour, lw=1.1, alpha=0.8)
            axes.set(title=f"{algorithm.upper()}, reward", xlabel="step")
        panels[0].set_ylabel("SDs of the reference")
        for (algorithm, objective), one in policies.groupby(["algorithm", "objective"], sort=False):
            label = f"{str(algorithm).upper()}, {str(objective).replace('_', '-')}"
            colour, mark = COLOURS[str(objective)], MARKS[str(algorithm)]
            panels[-1].plot(one["kl"], one["gold"], mark, color=colour, ms=5, label=label)
        panels[-1].axhline(reference, color=REFERENCE, ls="--", lw=1, label="reference")
        panels[-1].set(title="gold, evaluated", xlabel="KL to the reference, nats")
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
        return figure
