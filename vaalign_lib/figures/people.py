"""Figures of notebook 10."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vaalign_lib.figures import style
from vaalign_lib.figures.endpoint import COLOURS as METHOD_COLOURS
from vaalign_lib.figures.endpoint import WORDS

COLOURS = METHOD_COLOURS | {"reference": style.REFERENCE}
NAMES = WORDS | {"reference": "reference"}
ESTIMATES = {"ensemble": style.SERIES[0], "predicted": style.SERIES[1], "mean alone": style.SERIES[2]}
ROWS = {"people": "words", "heads": "heads of few people", "linear": "words, linear policies"}
SHARES = {"real": "not chance", "beyond": "beyond like means", "by_mean": "by the mean alone"}


def disagreement(shares: pd.DataFrame, dome: pd.DataFrame) -> Figure:
    """Draw the variance of ratings against their mean, a panel for each domain, and how much of it is real.

    `shares`, `dome`: of `experiments.people.disagreement` and `.dome`.
    """
    domains = list(dome["domain"].unique())
    with style.grid(len(domains) + 1, 3, 8.2, 2.6) as (figure, panels):
        for axes, domain in zip(panels, domains, strict=False):
            part = dome[dome["domain"] == domain]
            axes.fill_between(
                part["mean"], part["chance_low"], part["chance_high"],
                color=style.REFERENCE, alpha=0.25, linewidth=0, label="by chance, among texts of like mean",
            )  # fmt: skip
            axes.fill_between(
                part["mean"], part["low"], part["high"], facecolor="none", edgecolor=style.SERIES[0],
                linewidth=1.2, label="middle 80% of texts",
            )  # fmt: skip
            axes.plot(part["mean"], part["variance"], color=style.SERIES[0], label="mean")
            edge = np.linspace(-4, 4, 81)
            axes.plot(edge, 16 - edge**2, ":", color="black", linewidth=1, label="most that the scale allows")
            axes.set(xlim=(-4, 4), ylim=(0, 3), title=domain)
        for axes in panels[::3]:
            axes.set_ylabel("variance of ratings")
        for axes in panels[-4:-1]:
            axes.set_xlabel("mean rating")
        axes = panels[-1]
        places = style.lines_of(axes, shares["domain"].tolist())
        for k, (name, words) in enumerate(SHARES.items()):
            colour = style.SERIES[3 * k % 8]
            style.forest(axes, shares, places + 0.22 * (1 - k), name, colour, markersize=4)
            style.note(axes, words, "lower right", colour, line=2 - k)
        axes.set(xlim=(0, 1), title="share of variances' variance")
        axes.set_ylim(axes.get_ylim()[0] - 1.6, axes.get_ylim()[1])
        every = shares[shares["domain"] == "all"].iloc[0]
        style.headline(
            figure,
            f"{every['real']:.0%} of how differently people disagree about {every['texts']:,.0f} texts "
            f"is not chance; the mean rating explains {every['by_mean']:.0%}, and {every['beyond']:.0%} "
            f"({every['beyond_low']:.0%} to {every['beyond_high']:.0%}) is more than "
            "among texts of like mean",
        )
        style.legend_outside(figure, panels[0], 2)
        return figure


def reward_models(table: pd.DataFrame, scope: str = "within domains") -> Figure:
    """Draw rank correlations of estimated variances with the people's variance and with the squared error.

    `table`: of `experiments.people.reward_models`; a panel for each aim and number of people a text.
    """
    table = table[table["scope"] == scope]
    people = sorted(table["people"].unique())
    with style.canvas(7.4, 5.4, len(people), 2, sharex=True, sharey="row") as (figure, panels):
        for row, (aim, words) in enumerate((("people", "people's variance"), ("error", "squared error"))):
            for axes, count in zip(panels[row * len(people) :], people, strict=False):
                part = table[(table["against"] == aim) & (table["people"] == count)]
                for k, (name, colour) in enumerate(ESTIMATES.items()):
                    one = part[part["estimate"] == name]
                    axes.errorbar(
                        one["texts"] * 1.06 ** (k - 1), one["correlation"], style.spans(one, "correlation"),
                        fmt="o-", color=colour, markersize=4, label=name,
                    )  # fmt: skip
                top = part[part["estimate"] == "ceiling"]
                axes.plot(top["texts"], top["correlation"], "--", color="black", lw=1, label="ceiling")
                axes.axhline(0, color="black", linewidth=0.8)
                sizes = sorted(part["texts"].unique())
                style.log_ticks(axes, "x", sizes, lambda size: f"{size:,.0f}")
                if row == 0:
                    axes.set_title(f"{count} {'person' if count == 1 else 'people'} a text")
                else:
                    axes.set_xlabel("texts of a head")
            panels[row * len(people)].set_ylabel(f"rank correlation with\nthe {words}")
        style.headline(figure, said(table))
        style.legend_outside(figure, panels[0], 4)
        return figure


def said(table: pd.DataFrame) -> str:
    """Return what the smallest number of people and the middle number of texts give."""
    size = table["texts"].drop_duplicates().sort_values().iloc[table["texts"].nunique() // 2]
    main = table[(table["texts"] == size) & (table["people"] == table["people"].min())]
    known = main.set_index(["estimate", "against"])["correlation"]
    return (
        f"With {size:,} texts a head, one person each: the ensemble's variance is correlated "
        f"{known['ensemble', 'people']:.2f} with the people's and {known['ensemble', 'error']:.2f} with the "
        f"error, the predicted one {known['predicted', 'people']:.2f} and {known['predicted', 'error']:.2f}"
    )


def endpoint(table: pd.DataFrame) -> Figure:
    """Draw ratios of variance per squared gain with intervals over worlds, by rival, row and KL.

    `table`: of `experiments.people_bench.log_ratios`; rows of fewer than five worlds are left out, for their
    intervals are as wide as the picture.
    """
    table = table[table["worlds"] > 4]
    groups = [f"{NAMES[one.rival]} : variance-aware" for one in table.itertuples()]
    table = table.assign(group=groups).sort_values("group", kind="stable")
    most = table["worlds"].max()
    with style.canvas(7.2, 0.24 * len(table) + 2.2) as (figure, [axes]):
        names = [
            f"{ROWS[one.row]}, {one.nats:g} nat{'' if one.nats == 1 else 's'}"
            + ("" if one.worlds == most else f", {one.worlds} worlds")
            for one in table.itertuples()
        ]
        places = style.lines_of(axes, names, table["group"].tolist())
        for row, colour in zip(ROWS, (style.AWARE, style.SERIES[0], style.SERIES[1]), strict=True):
            for clear, face in ((True, colour), (False, "white")):  # open: a gain may be below 0
                mine = ((table["row"] == row) & (table["clear"] == clear)).to_numpy()
                shown = np.exp(table.loc[mine, ["log_ratio", "log_ratio_low", "log_ratio_high"]])
                style.forest(axes, shown, places[mine], "log_ratio", colour, mfc=face)
        style.octaves(axes, "x", np.exp(np.stack(style.ends(table, "log_ratio"))))
        axes.set_xlabel("variance per squared gain, times variance-aware's")
        main = table[(table["row"] == "people") & (table["nats"] == 0.5)].set_index("rival")
        told = "; ".join(
            f"{NAMES[rival]} {one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
            for rival, one in ((r, np.exp(_interval(main.loc[r]))) for r in main.index)
        )
        how = f"mean of {most} worlds with 95% intervals over them"
        style.headline(figure, f"At equal KL, 0.5 nats, people's words, {how}: {told}")
        return figure


def trained(policies: pd.DataFrame) -> Figure:
    """Draw the gain of each trained policy over its KL, a panel for each row, the reference at the origin.

    `policies`: of `experiments.people_policies.gains`; bars are two standard errors of the evaluation.
    """
    rows = policies["row"].unique()
    with style.canvas(max(4.6, 3.7 * len(rows)), 3.6, len(rows)) as (figure, panels):
        for axes, row in zip(panels, rows, strict=True):
            axes.axhline(0, color="black", linewidth=0.8)
            for method, part in policies[policies["row"] == row].groupby("method", sort=False):
                axes.errorbar(
                    part["kl"], part["gain"], 2 * part["true_reward_error"], fmt="o", color=COLOURS[method],
                    markersize=4, linewidth=0.8, alpha=0.7, label=NAMES[method],
                )  # fmt: skip
            axes.set(xlabel="KL to the reference, nats", ylabel="gain in true reward", title=ROWS[row])
        told = []
        for row, part in policies[policies["method"] != "reference"].groupby("row", sort=False):
            means = part.groupby("method", sort=False)[["gain", "kl"]].mean().iterrows()
            each = ", ".join(f"{NAMES[one]} {mean.gain:.2f} at {mean.kl:.2f}" for one, mean in means)
            told.append(f"{ROWS[row]}, {part['policy'].nunique()} policies each: {each} nats")
        style.headline(figure, "Mean gain over the reference: " + "; ".join(told))
        style.legend_outside(figure, panels[0], 4)
        return figure


def _interval(row: pd.Series) -> pd.Series:
    values = row[["log_ratio", "log_ratio_low", "log_ratio_high"]].astype(float)
    return values.set_axis(["value", "low", "high"])


def words(table: pd.DataFrame) -> Figure:
    """Draw the words whose use falls and rises most, a panel for each method, against people's variance."""
    methods = list(table["method"].unique())
    with style.canvas(8.2, 4.4, len(methods), sharex=True) as (figure, panels):
        for axes, method in zip(panels, methods, strict=True):
            part = table[table["method"] == method].sort_values("change", ascending=False)
            named = [f"{one.word} ({one.variance:.1f})" for one in part.itertuples()]
            places = style.lines_of(axes, named)
            axes.barh(places, 100 * part["change"], color=COLOURS[method], alpha=0.55)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(title=NAMES[method], xlabel="change of share,\npoints")
        rising = table[table["change"] > 0].assign(weighed=table["change"] * table["variance"])
        sums = rising.groupby("method", sort=False)[["weighed", "change"]].sum()
        told = ", ".join(
            f"{value:.2f} ({NAMES[one]})" for one, value in (sums["weighed"] / sums["change"]).items()
        )
        style.headline(
            figure,
            f"People's variance (in brackets) of the words that rise most, weighed by their rise: {told}",
        )
        return figure
