"""Figures of the feature bench."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures import style

COLOURS = {"persistent": style.SERIES[0], "fresh": style.SERIES[1]}
TICKS = [4.0**power for power in range(-3, 5)]
NAMES = {"persistent": "judges that stay themselves", "fresh": "independent errors"}


def dose_response(table: pd.DataFrame, pooled: pd.DataFrame) -> Figure:
    """Draw (gain / deviation)^2 over the placebo's against what the weights know, a point for each world.

    `table`, `pooled`: of `experiments.feature_bench.dose_response` and `.pooled`.
    """
    table, pooled = (one[one["weights"] == "correlated"] for one in (table, pooled))
    with style.canvas(7.2, 3.9) as (figure, [axes]):
        for shift, (noise, colour) in zip((-0.02, 0.02), COLOURS.items(), strict=True):
            worlds, means = table[table["noise"] == noise], pooled[pooled["noise"] == noise]
            axes.scatter(
                worlds["rho"] + shift, np.exp(worlds["log_ratio"]), s=9, color=colour, alpha=0.3, linewidths=0
            )
            means = means.assign(rho=means["rho"] + shift)
            axes.errorbar(
                means["rho"], means["ratio"], yerr=style.spans(means, "ratio"), color=colour, fmt="o-",
                markersize=4.5, linewidth=1.4, label=NAMES[noise],
            )  # fmt: skip
        style.log_ticks(axes, "y", TICKS, lambda tick: f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(sorted(set(pooled["rho"])))
        axes.set_xlabel("correlation of the weights with the variance of the judge's errors (normal scores)")
        axes.set_ylabel("(gain / SD)², over the placebo's")
        style.note(axes, f"{table['world'].nunique()} worlds, mean and 95% interval", "lower right")
        style.headline(figure, said(pooled))
        style.legend_outside(figure, axes, 2)
        return figure


def said(pooled: pd.DataFrame) -> str:
    """Return what `pooled` says of the highest and the lowest correlation of each noise."""
    parts = []
    for noise, name in NAMES.items():
        means = pooled[(pooled["noise"] == noise) & (pooled["weights"] == "correlated")].sort_values("rho")
        found = [f"{_verdict(row)} at {row['rho']:g}" for row in means.iloc[[-1, 0]].to_dict("records")]
        parts.append(f"{name}, {' and '.join(found)}")
    return f"At equal KL (gain / SD)² against a placebo's: {'; '.join(parts)}. 95% intervals."


def _verdict(row: dict[str, float]) -> str:
    interval = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    word = "higher" if row["ratio_low"] > 1 else "lower" if row["ratio_high"] < 1 else "not shown to differ"
    return f"{word}, {interval},"
