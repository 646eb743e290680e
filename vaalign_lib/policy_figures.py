"""Figures of policies in training."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaalign_lib.figures import POLICY_COLOURS, canvas

LABELS = {
    "reward": "reward, SDs of the reference",
    "gold": "gold reward, SDs of the corpus",
    "true_reward": "true reward, the source's unit",
    "kl": "KL to the reference, nats",
    "length": "tokens of a response",
    "variance": "variance of the reward, 1 = reference",
}


def learning_curves(
    logs: Mapping[str, pd.DataFrame],
    measures: Sequence[str] = ("reward", "gold", "kl", "length"),
) -> Figure:
    """Draw mean curves over policies, with the middle 80% of them, over five steps at a time.

    Args:
        logs: of trainers, by method.
        measures: columns of the logs, a panel each.
    """
    with canvas(2.7 * len(measures), 2.8, len(measures)) as (figure, panels):
        for axes, measure in zip(panels, measures, strict=True):
            for name, log in logs.items():
                _curve(axes, log, measure, name.replace("_", "-"))
            axes.set(xlabel="step", title=LABELS.get(measure, measure.replace("_", " ")))
        panels[0].legend(fontsize="small")
        counts = ", ".join(
            f"{log['policy'].nunique()} {name.replace('_', '-')}" for name, log in logs.items()
        )
        figure.suptitle(f"{counts}; lines: means, bands: the middle 80% of policies", fontsize=9)
        return figure


def _curve(axes: Axes, log: pd.DataFrame, measure: str, name: str) -> None:
    table = (
        log.pivot(index="step", columns="policy", values=measure).rolling(5, min_periods=1).mean()
    )
    low, high = np.quantile(table, (0.1, 0.9), axis=1)
    colour = POLICY_COLOURS.get(name)
    axes.fill_between(table.index, low, high, alpha=0.2, color=colour, linewidth=0)
    axes.plot(table.index, table.mean(axis=1), color=colour, label=name)
