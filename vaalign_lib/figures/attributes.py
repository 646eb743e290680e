"""The figures of notebook 06: one function each, tidy data in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm

from vaalign_lib.figures import style
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import mean

ONE, OTHER, THIRD = style.SERIES[:3]
LOSSES = {"mle": ("likelihood", ONE, "o"), "regression": ("regression", THIRD, "s")}
WEIGHTS = ("placebo", "none", "aleatoric", "epistemic", "total", "errors")


def _over(table: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Return means over seeds or worlds with Student's intervals, a row per group."""
    rows = []
    for key, part in table.groupby(list(by), sort=False):
        found = mean(part[column].to_numpy()).columns(column)
        rows.append(dict(zip(by, key, strict=True)) | found)
    return pd.DataFrame(rows)


def deviations(paths: Mapping[str, Array], truth: float, pairs: pd.DataFrame) -> Figure:
    """Ways of a deviation under gradient descent by loss, beside the labels' own, the `truth`; and,
    from comparisons alone, fitted against true deviations of items: `true`, `likelihood`, `sampled`.
    """
    with style.canvas(7.6, 3.6, 2) as (figure, (left, right)):
        for (name, path), colour in zip(paths.items(), (THIRD, ONE), strict=True):
            left.plot(path, color=colour)
            style.label(left, len(path) - 1, path[-1], name, colour, offset=(0, 8), ha="right")
        left.axhline(truth, color=style.TRUTH, linestyle=":", linewidth=1)
        left.set(xlabel="gradient step", ylabel="σ", title="Ratings (dotted: raters' own)", ylim=(0, None))
        top = 1.1 * pairs["true"].max()
        right.plot([0, top], [0, top], color=style.REFERENCE, linewidth=0.8)
        right.plot(pairs["true"], pairs["likelihood"], "o", color=ONE, label="likelihood of Gaussian rewards")
        right.plot(pairs["true"], pairs["sampled"], "s", color=OTHER, label="Bradley-Terry, sampled rewards")
        right.set(xlabel="true σ of an item", ylabel="σ learned from comparisons", title="Comparisons")
        right.legend(loc="upper left")
        style.headline(
            figure,
            f"Regression takes σ to {paths['regression'][-1]:.2f} where the raters' own is {truth:g}; "
            f"Bradley-Terry takes it to {pairs['sampled'].max():.3f}; likelihoods find the true one",
        )
    return figure


def learned_variances(table: pd.DataFrame, curve: pd.DataFrame, threshold: float) -> Figure:
    """Rank correlations of stated and true variance by attribute and seed (`kind`, `seed`, `attribute`,
    `rank`), and the true by the stated variance in tenths of it (`attribute`, `stated`, `true`).
    """
    with style.canvas(7.8, 4.0, 2) as (figure, (left, right)):
        names = list(dict.fromkeys(table["attribute"]))
        places = style.lines_of(left, names)
        for k, (kind, (text, colour, mark)) in enumerate(LOSSES.items()):
            rows = table[table["kind"] == kind]
            at = places + 0.15 - 0.3 * k
            for place, name in zip(at, names, strict=True):
                values = rows.loc[rows["attribute"] == name, "rank"]
                left.plot(values, np.full(len(values), place), mark, color=colour, alpha=0.15, markersize=3)
            found = _over(rows, ["attribute"], "rank")
            style.forest(left, found, at, "rank", colour, fmt=mark, label=text)
        left.axvline(0, color="black", linewidth=0.8)
        dotted: Any = {"linestyle": ":", "label": f"threshold of the protocol, {threshold:g}"}
        left.axvline(threshold, color=style.REFERENCE, linewidth=1.2, **dotted)
        left.set(xlabel="rank correlation with the raters' variance", title="By seed; mean, 95%")
        style.legend_outside(figure, left, 3)
        for name, colour in zip(names, style.SERIES, strict=False):
            rows = curve[curve["attribute"] == name]
            right.plot(rows["stated"], rows["true"], "o-", color=colour, markersize=3, label=name)
        ends = [curve[["stated", "true"]].to_numpy().min(), curve[["stated", "true"]].to_numpy().max()]
        right.plot(ends, ends, color=style.REFERENCE, linewidth=0.8)
        style.plain_log(right, "xy")
        right.set(xlabel="variance stated (likelihood)", ylabel="raters' variance", title="Calibration")
        right.legend(loc="upper left")
        medians = table[table["kind"] == "mle"].groupby("seed")["rank"].median()
        share = (curve["true"] / curve["stated"]).median()
        style.headline(
            figure,
            f"Likelihood's variance and the raters': rank correlation {medians.mean():.2f} (median of "
            f"attributes, mean of {len(medians)} seeds); theirs is {share:.2f} of what is stated",
        )
    return figure


def distributions(table: pd.DataFrame) -> Figure:
    """Figure 5: a URM's normal distributions of every attribute's score for some texts, a row each: `texts`
    (what they are), `text`, `attribute`, `mean`, `deviation`.
    """
    names, kinds = (list(dict.fromkeys(table[column])) for column in ("attribute", "texts"))
    with style.canvas(8.6, 2.9, len(names), sharey=True) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            own = table[table["attribute"] == name]
            reach = (own["mean"] - 3 * own["deviation"]).min(), (own["mean"] + 3 * own["deviation"]).max()
            grid = np.linspace(*reach, 300)
            for kind, colour in zip(kinds, (ONE, OTHER), strict=True):
                for k, (_, row) in enumerate(own[own["texts"] == kind].iterrows()):
                    density = norm.pdf(grid, row["mean"], row["deviation"])
                    axes.plot(grid, density, color=colour, label=kind if k == 0 else None)
            axes.set(title=name, xlabel="score")
        panels[0].set_ylabel("density")
        middle = table.groupby("texts", sort=False)["deviation"].median()
        told = ", ".join(f"{kind} {value:.2f}" for kind, value in middle.items())
        style.headline(figure, f"Median deviation of these texts' scores: {told}")
        style.legend_outside(figure, panels[0], 2)
    return figure


def outside(table: pd.DataFrame) -> Figure:
    """AUROC of texts out of distribution: `texts`, `members`, `measure`, `seed`, `auroc`."""
    groups = list(dict.fromkeys(table["texts"]))
    with style.canvas(8.4, 3.9, len(groups), sharex=True) as (figure, panels):
        for axes, name in zip(panels, groups, strict=True):
            own = table[table["texts"] == name]
            measures = ("URM", "Eq. 7", "Eq. 8", "length", "Mahalanobis")
            places = style.lines_of(axes, measures)
            axes.tick_params(labelleft=axes is panels[0])
            members = (("alike", ONE, "o"), ("bootstrap", OTHER, "s"), ("none", style.REFERENCE, "D"))
            for k, (kind, colour, mark) in enumerate(members):
                for place, measure in zip(places, measures, strict=True):
                    values = own.loc[(own["members"] == kind) & (own["measure"] == measure), "auroc"]
                    at = place + (0.15 - 0.3 * k if kind != "none" else 0)
                    if len(values) > 1:
                        row = pd.DataFrame([mean(values).columns("auroc")])
                        style.forest(axes, row, np.array([at]), "auroc", colour, fmt=mark)
                    elif len(values):
                        axes.plot(values, [at], mark, color=colour, markersize=5)
                axes.plot([], [], mark, color=colour, label={"none": "baseline"}.get(kind, f"members {kind}"))
            axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
            axes.set(title=name, xlabel="AUROC", xlim=(-0.03, 1.03))
        means = table[table["texts"] == groups[0]].groupby(["members", "measure"])["auroc"].mean()
        best = max(means["none"])
        style.headline(
            figure,
            f"On {groups[0]}, Equation 7 {means['alike', 'Eq. 7']:.2f} (members alike), "
            f"{means['bootstrap', 'Eq. 7']:.2f} (bootstrap); the better baseline {best:.2f}. Seeds, 95%.",
        )
        style.legend_outside(figure, panels[0], 3)
    return figure


def filtering(curves: pd.DataFrame, halves: pd.DataFrame) -> Figure:
    """Figure 6c: accuracy against the share of pairs kept (`measure`, `kept`, `seed`, `accuracy`), and what
    certainty is worth among all pairs and at equal margin (`measure`, `among`, `seed`, `gain`).
    """
    names = list(dict.fromkeys(curves["measure"]))
    with style.canvas(7.8, 3.8, 2) as (figure, (left, right)):
        found, gains = (
            _over(curves, ["measure", "kept"], "accuracy"),
            _over(halves, ["measure", "among"], "gain"),
        )
        places = style.lines_of(right, names)
        for k, (name, colour) in enumerate(zip(names, style.SERIES, strict=False)):
            style.band(left, found[found["measure"] == name], "kept", "accuracy", colour, label=name)
            for among, mark, shift in (("all", "o", 0.15), ("equal margin", "s", -0.15)):
                rows = gains[(gains["measure"] == name) & (gains["among"] == among)]
                style.forest(right, rows, places[[k]] + shift, "gain", colour, fmt=mark)
        left.set(
            xlabel="share of pairs kept, most certain first", ylabel="accuracy by gold", title="Filtering"
        )
        style.percent(left.yaxis)
        style.percent(left.xaxis)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(xlabel="accuracy of the certain half minus all", title="○ all pairs, □ at equal margin")
        style.percent(right.xaxis, 1)
        told = gains.set_index(["measure", "among"])["gain"]
        words = "; ".join(
            f"{n} {told[n, 'all']:+.1%}, at equal margin {told[n, 'equal margin']:+.1%}" for n in names
        )
        style.headline(figure, f"What certainty is worth: {words}. Bands and bars: 95% over seeds.")
        style.legend_outside(figure, left, len(names))
    return figure


def best_of_n(table: pd.DataFrame, of: str = "gold gained, corpus SDs", unit: str = "seeds") -> Figure:
    """Table 2: what the best of n gains against its KL (`chooser`, `n`, `kl`, `gain`, a row a unit)."""
    with style.canvas(6.2, 3.6) as (figure, (axes,)):
        found = _over(table, ["chooser", "kl"], "gain")
        names = list(dict.fromkeys(table["chooser"]))
        for name, colour, mark in zip(names, style.SERIES, style.MARKERS, strict=False):
            rows = found[found["chooser"] == name]
            style.band(axes, rows, "kl", "gain", colour, marker=mark, markersize=3.5, label=name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="KL of best-of-n, nats", ylabel=of)
        last = found.groupby("chooser", sort=False)["gain"].last()
        told = ", ".join(f"{name} {value:.2f}" for name, value in last.items())
        style.headline(figure, f"Best of {table['n'].max()}: {told}. Bands: 95% over {unit}.")
        style.legend_outside(figure, axes, len(names))
    return figure


def merging(table: pd.DataFrame) -> Figure:
    """Figure 7: how many held-out pairs members, their ensemble and the merged model rank rightly, a row per
    `kind` and pair.
    """
    kinds, columns = list(dict.fromkeys(table["kind"])), ("members", "ensemble", "merged")
    with style.canvas(6.4, 3.4) as (figure, (axes,)):
        places = style.lines_of(axes, [LOSSES.get(kind, (kind,))[0] for kind in kinds])
        for k, (name, colour, mark) in enumerate(zip(columns, style.SERIES, style.MARKERS, strict=False)):
            rows = _over(table, ["kind"], name)
            style.forest(axes, rows, places + 0.2 - 0.2 * k, name, colour, fmt=mark, label=name)
        axes.set(xlabel="held-out pairs ranked as gold does")
        style.percent(axes.xaxis, 1)
        gains = (table["merged"] - table["members"]).groupby(table["kind"], sort=False).mean()
        told = ", ".join(f"{LOSSES.get(kind, (kind,))[0]} {gain:+.1%}" for kind, gain in gains.items())
        style.headline(figure, f"Merged minus members: {told}. Bars: 95% over pairs.")
        style.legend_outside(figure, axes, 3)
    return figure


def bench_weights(table: pd.DataFrame) -> Figure:
    """Worth of weights against what they know of the errors: `world`, `weights`, `rank`, `log_ratio`."""
    with style.canvas(6.8, 4.6) as (figure, (axes,)):
        ratios, ranks = _over(table, ["weights"], "log_ratio"), table.groupby("weights")["rank"].mean()
        for name, colour, mark in zip(WEIGHTS, style.SERIES, style.MARKERS, strict=False):
            own, row = table[table["weights"] == name], ratios[ratios["weights"] == name]
            axes.plot(own["rank"], np.exp(own["log_ratio"]), mark, color=colour, alpha=0.25, markersize=3)
            row = np.exp(row.drop(columns="weights"))
            words = {"none": "none (vanilla)", "errors": "true variance of errors"}.get(name, name)
            bars: Any = {"fmt": mark, "color": colour, "label": words}
            axes.errorbar([ranks[name]], row["log_ratio"], style.spans(row, "log_ratio"), **bars)
        style.octaves(
            axes, "y", np.exp([*table["log_ratio"], *np.stack(style.ends(ratios, "log_ratio")).flat])
        )
        style.legend_outside(figure, axes, 3)
        axes.set(xlabel="rank correlation with the errors' true variance",
                 ylabel="(gain / SD)², times the placebo's")  # fmt: skip
        wide = table.pivot(index="world", columns="weights", values="log_ratio")
        ratio = np.exp((wide["epistemic"] - wide["aleatoric"]).mean())
        told = ", ".join(
            f"{name} {np.exp(wide[name].mean()):.2f}" for name in ("aleatoric", "epistemic", "total")
        )
        style.headline(
            figure,
            f"Times the placebo's (gain / SD)²: {told}; epistemic {ratio:.2f} times aleatoric. {len(wide)} "
            "worlds, 95%.",
        )
    return figure


def people(table: pd.DataFrame) -> Figure:
    """Rank correlations of stated variances with those of held-out people, by `domain`, `kind` and `fold`."""
    domains = list(dict.fromkeys(table["domain"]))
    with style.canvas(6.4, 3.6) as (figure, (axes,)):
        places = style.lines_of(axes, domains)
        series = [(kind, "rank", *look) for kind, look in LOSSES.items()]
        series.append(("mle", "ceiling", "variance of the people heard", style.TRUTH, "D"))
        for k, (kind, column, text, colour, mark) in enumerate(series):
            rows = _over(table[table["kind"] == kind], ["domain"], column)
            style.forest(axes, rows, places + 0.25 - 0.25 * k, column, colour, fmt=mark, label=text)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="rank correlation with held-out people's variance")
        own = table[(table["kind"] == "mle") & (table["domain"] == "all")]
        style.headline(
            figure,
            f"Real people: rank correlation of likelihood's variance with that of people it has not heard, "
            f"{own['rank'].mean():.2f} within domains. Bars: 95% over folds.",
        )
        style.legend_outside(figure, axes, 3)
    return figure
