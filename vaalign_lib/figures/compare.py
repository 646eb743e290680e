"""The figure of a comparison of one's own."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures import style


def comparison(gains: pd.DataFrame, contrasts: pd.DataFrame, told: str, unit: str) -> Figure:
    """Draw each policy's gain over its KL, and each method beside the first: difference in gain, ratio of
    variances, difference of the risks, with the smallest effects that would have been seen.

    `gains` has `method`, `gain` and `kl`; `contrasts` is that of `experiments.answer.Answer`.
    """
    names = list(dict.fromkeys(gains["method"]))
    words = {name: style.METHODS.get(name, name.replace("_", " ")) for name in names}
    own = iter(style.SERIES)
    colours = {name: style.POLICY_COLOURS.get(words[name]) or next(own) for name in names}
    order = contrasts["method"].map(names.index)
    rows = contrasts.loc[order.sort_values(kind="stable").index].to_dict("records")
    several = len({row["world"] for row in rows}) > 1
    lines = [f"world {row['world']}".replace("world all", "their mean") for row in rows]
    groups = [words[row["method"]] for row in rows]
    count = len(rows) + several * len(set(groups))
    heights = 2.4, 1.3 + 0.24 * count
    with style.canvas(7.2, 2.2 + sum(heights), 3, 2, height_ratios=heights) as (figure, axes):
        place: Any = axes[0].get_subplotspec()
        for one in axes[:3]:
            one.remove()
        scatter = figure.add_subplot(place.get_gridspec()[0, :])
        for name in names:
            one = gains[gains["method"] == name]
            scatter.plot(
                one["kl"], one["gain"], "o", ms=3.5, alpha=0.6, color=colours[name], label=words[name]
            )
            middle = one["kl"].mean(), one["gain"].mean()
            scatter.plot(*middle, "D", ms=8, color=colours[name], mec="white", mew=1.2)
        scatter.axhline(0, color=style.REFERENCE, ls="--", lw=1)
        scatter.set(xlabel="KL to the start, nats", ylabel="gain over the start")
        scatter.set_title(f"{unit} (small) and their means")
        base = words[names[0]]
        panels = {
            "gain_difference": (f"gain, minus {base}'s\nright: gains more", 0.0),
            "variance_ratio": (f"variance, {base}'s : its\nright: varies less", 1.0),
            "risk_difference": (f"risk, {base}'s minus its\nright: less risk", 0.0),
        }
        for panel, (measure, (label, nothing)) in zip(axes[3:], panels.items(), strict=True):
            places = style.lines_of(panel, lines if several else groups, groups if several else None)
            if panel is not axes[3]:
                panel.set_yticklabels([])
            for place, row in zip(places, rows, strict=True):
                seen = row[f"{measure}_seen"]
                ends = (1 / seen, seen) if nothing else (-seen, seen)
                if np.isfinite(ends).all():
                    panel.fill_betweenx([place - 0.4, place + 0.4], *ends, color="#e4e4e4", lw=0, zorder=0)
                style.forest(panel, pd.DataFrame([row]), np.array([place]), measure, colours[row["method"]])
            panel.axvline(nothing, color="black", lw=0.8)
            if nothing:
                style.plain_log(panel)
                panel.xaxis.set_major_formatter("{x:g}")
            panel.set_xlabel(label)
        grey = "Bars: 95% intervals; grey: effects that had less than four chances in five to be seen."
        style.headline(figure, f"{told}\n{grey}")
        style.legend_outside(figure, scatter, len(names))
        return figure
