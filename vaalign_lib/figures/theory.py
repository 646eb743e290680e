"""One function per figure: tidy data in, a matplotlib Figure out.

One palette everywhere: vanilla blue, variance-aware vermilion, reference grey (colour-blind safe).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, PercentFormatter

from vaalign_lib.figures.style import (
    AWARE,
    EXACT,
    GRPO,
    POLICY_COLOURS,
    PRINTED,
    REFERENCE,
    SHORT_FORMS,
    TRUTH,
    VANILLA,
    canvas,
)
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, proportion
from vaalign_lib.theory import bounds as theory
from vaalign_lib.theory.bandit import Bandit, typical_reversed_estimates


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f}% [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


# --- notebook 01 ------------------------------------------------------------------------------------


def bandit_arms(bandit: Bandit, estimates: Array) -> Figure:
    """Figure 2: the arms with their estimates and uncertainty, and the two policies they lead to.

    Args:
        bandit: the arms.
        estimates: R-hat (draws, arms); the mean of those in fully reversed order is shown.
    """
    shown = typical_reversed_estimates(bandit, estimates)
    arms = np.arange(1, bandit.rewards.size + 1)
    with canvas(8.4, 3.5, 2) as (figure, (left, right)):
        left.errorbar(
            arms,
            shown,
            yerr=1.96 * np.asarray(bandit.deviations),
            fmt="o",
            color=VANILLA,
            ecolor=AWARE,
            elinewidth=1.5,
            capsize=6,
            capthick=1.5,
            markersize=8,
            label="estimate",
        )
        left.plot(arms, bandit.rewards, "o", color=TRUTH, markersize=8, label="true reward")
        left.annotate(
            "estimate, ±1.96σ",
            (arms[0], shown[0]),
            (10, 0),
            textcoords="offset points",
            color=VANILLA,
            va="center",
        )
        left.annotate(
            "true reward",
            (arms[0], bandit.rewards[0]),
            (10, 0),
            textcoords="offset points",
            color=TRUTH,
            va="center",
        )
        left.set(
            xlabel="arm",
            ylabel="reward",
            xticks=arms,
            title="Estimates in fully reversed order",
            xlim=(0.6, arms[-1] + 0.5),
        )
        policies = {
            "reference": bandit.reference,
            "vanilla": bandit.vanilla(shown[None])[0],
            "variance-aware": bandit.variance_aware(shown[None])[0],
        }
        _policy_bars(right, policies, bandit.rewards)
        right.set(title="Policies from these estimates", xlabel="arm")
    return figure


def _policy_bars(axes: Axes, policies: Mapping[str, Array], rewards: Array) -> None:
    arms, width = np.arange(1, rewards.size + 1), 0.8 / len(policies)
    for k, (name, policy) in enumerate(policies.items()):
        place = arms + (k - (len(policies) - 1) / 2) * width
        label = f"{name}: return {policy @ rewards:.2f}"
        bars = axes.bar(place, policy, 0.92 * width, color=POLICY_COLOURS[name], label=label)
        if len(policies) <= 3:
            axes.bar_label(bars, [f"{p:.2f}" for p in policy], fontsize=8, padding=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(ylabel="probability", xticks=arms)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1, fontsize=8.5)


def bandit_returns(
    bandit: Bandit,
    samples: Mapping[str, tuple[Array, Array]],
    printed: tuple[float, float],
    width: float = 9.4,
) -> Figure:
    """Figure 3: the distribution of the true return of both policies over draws of the estimates.

    Args:
        bandit: the arms.
        samples: a panel title to the returns (vanilla, variance-aware), each (draws,).
        printed: the paper's risks of the two policies.
        width: of the figure, in inches.
    """
    tail = 0.002 if bandit.form == "free" else 0.0  # the closed form's returns have long tails
    ends = np.array([np.quantile(v, [tail, 1 - tail]) for pair in samples.values() for v in pair])
    edges = np.linspace(ends[:, 0].min(), ends[:, 1].max(), 61)
    with canvas(width, 3.7, len(samples), sharex=True) as (figure, panels):
        for axes, (title, returns) in zip(panels, samples.items(), strict=True):
            _return_histograms(axes, bandit, returns, edges, printed)
            axes.set(title=title, xlabel="return $\\pi^\\top r^*$ under the true rewards")
        panels[0].set_ylabel("share of draws")
    return figure


def _return_histograms(
    axes: Axes, bandit: Bandit, returns: tuple[Array, Array], edges: Array, printed: tuple[float, float]
) -> None:
    names = ("vanilla", "variance-aware")
    for name, values in zip(names, returns, strict=True):
        _shares(axes, values, edges, POLICY_COLOURS[name])
    axes.axvline(bandit.base_return, color=REFERENCE, linewidth=2)
    axes.set_ylim(0, 1.6 * axes.get_ylim()[1])
    axes.annotate(
        f"base policy {bandit.base_return:.4f}",
        (bandit.base_return, 0.99),
        (4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=REFERENCE,
        va="top",
        fontsize=8.5,
    )
    background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
    lines = [("below the base policy:", "black")]
    for name, values, paper in zip(names, returns, printed, strict=True):
        risk = proportion(values <= bandit.base_return)
        lines.append((f"{name} {_percent(risk)}", POLICY_COLOURS[name]))
        lines.append((f"    paper {100 * paper:g}%", POLICY_COLOURS[name]))
    for k, (text, colour) in enumerate(lines):
        axes.text(
            0.01,
            0.92 - 0.065 * k,
            text,
            transform=axes.transAxes,
            color=colour,
            fontsize=8.5,
            va="top",
            bbox=background,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _shares(axes: Axes, values: Array, edges: Array, colour: str, label: str | None = None) -> None:
    """Draw a histogram of shares of all values as one outline, which is fast enough for sliders."""
    shares = np.histogram(values, edges)[0] / values.size
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.55, linewidth=0, label=label)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * shares.max()))


def bandit_forms(table: pd.DataFrame, printed: tuple[float, float]) -> Figure:
    """Risks of both policies under every form, beside the printed ones, and the reversed draws.

    Args:
        table: columns form, vanilla, vanilla_low, vanilla_high, the same for aware, and reversed_gain,
            the share of the draws in fully reversed order that leave the variance-aware policy above
            the base policy (NaN if there is no such draw).
        printed: the paper's two risks.
    """
    rows = np.arange(len(table))[::-1]
    with canvas(9.4, 3.5, 3, sharey=True) as (figure, panels):
        columns = (("vanilla", "vanilla"), ("aware", "variance-aware"))
        for axes, (column, name), paper in zip(panels, columns, printed, strict=False):
            bounds = table[[f"{column}_low", f"{column}_high"]].to_numpy().T
            error = np.abs(bounds - table[column].to_numpy())
            colour = POLICY_COLOURS[name]
            axes.errorbar(table[column], rows, xerr=error, fmt="o", color=colour, capsize=3)
            axes.axvline(paper, color="black", linewidth=1, linestyle=":")
            axes.set(title=f"risk of {name}\n(dotted: paper, {100 * paper:g}%)")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1 if paper > 0.1 else 3))
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(x=0.25)
        panels[2].barh(rows, table["reversed_gain"].fillna(0), color=AWARE, height=0.55)
        for row, value in zip(rows, table["reversed_gain"], strict=True):
            text, inside = f"{100 * value:.1f}%", value > 0.7
            place, colour = (value - 0.03, "white") if inside else (0.02, "black")
            side = "right" if inside else "left"
            panels[2].text(place, row, text, va="center", ha=side, fontsize=8.5, color=colour)
        panels[2].set(title="variance-aware gains on\nfully reversed estimates", xlim=(0, 1))
        panels[2].xaxis.set_major_formatter(PercentFormatter(1))
        panels[2].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].set(yticks=rows, yticklabels=[SHORT_FORMS[form] for form in table["form"]])
    return figure


def bandit_shift(table: pd.DataFrame) -> Figure:
    """Risk of the variance-aware policy when a constant is added to every reward.

    Args:
        table: columns form, shift, risk, low, high.
    """
    colours = {"printed": PRINTED, "exact": EXACT, "vanilla": VANILLA}
    with canvas(5.6, 3.5) as (figure, (axes,)):
        for form, group in table.groupby("form", sort=False):
            colour = colours[str(form)]
            axes.plot(group["shift"], group["risk"], color=colour, linewidth=2)
            axes.fill_between(
                group["shift"], group["low"], group["high"], color=colour, alpha=0.25, linewidth=0
            )
            row, side = (0, "left") if form == "printed" else (-1, "right")
            end = group.iloc[row]
            axes.annotate(
                SHORT_FORMS[str(form)],
                (end["shift"], end["risk"]),
                (6 if row == 0 else 0, 5),
                textcoords="offset points",
                color=colour,
                ha=side,
            )
        axes.axvline(0, color=REFERENCE, linewidth=1, linestyle=":")
        axes.set(
            xlabel="constant added to all rewards",
            ylabel="risk of underperforming",
            ylim=(-0.03, 1.0),
            title="The zero point of the rewards decides the printed form",
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


# --- notebook 02: Theorem 2.2 -----------------------------------------------------------------------


def lower_bound_probabilities(table: pd.DataFrame) -> Figure:
    """Theorem 2.2: printed bound, proof's bound, sharp bounds and simulated probabilities over beta."""
    arms = sorted(table["arms"].unique())
    signals = sorted(table["signal"].unique())
    greys = mpl.colormaps["Greys"](np.linspace(0.3, 1.0, len(signals)))
    betas = np.geomspace(table["beta"].min(), table["beta"].max(), 300)
    with canvas(2.2 * len(arms) + 1.8, 3.2, len(arms), sharey=True) as (figure, panels):
        for axes, count in zip(panels, arms, strict=True):
            low, high = theory.lower_bound(count, betas), theory.upper_bound(betas)
            axes.fill_between(betas, low, high, color=TRUTH, alpha=0.18, linewidth=0)
            axes.plot(betas, low, color=TRUTH, label=r"sharp: $F_n(\beta^2)$, $\Phi(\beta)$")
            axes.plot(betas, high, color=TRUTH)
            printed, proof = theory.printed_bound(count, betas), theory.proof_bound(count, betas)
            axes.plot(betas, printed, color=PRINTED, linestyle="--", label="as printed")
            axes.plot(betas, proof, color=GRPO, linestyle="-.", label="as the proof gives it")
            for colour, signal in zip(greys, signals, strict=True):
                one = table[(table["arms"] == count) & (table["signal"] == signal)]
                label = rf"simulated, $|r^*|={signal:g}\sigma$"
                axes.plot(one["beta"], one["probability"], ".", color=colour, label=label)
            axes.set(xscale="log", xlabel=r"$\beta$", title="1 arm" if count == 1 else f"{count} arms")
        panels[0].set_ylabel("probability of the inequality")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return figure


def box_solution(table: pd.DataFrame, truth: float) -> Figure:
    """Equation (1) on the box: its value and its solution over beta.

    Args:
        table: columns beta, value, arm, estimate, d.
        truth: sup of r*' d, the right side of Theorem 2.2.
    """
    with canvas(8.6, 3.3, 2) as (figure, (left, right)):
        values = table.drop_duplicates("beta")
        left.plot(values["beta"], values["value"], color=AWARE, linewidth=2)
        left.axhline(truth, color=TRUTH)
        left.annotate(
            "$\\sup_d\\, r^{*\\top} d = 2\\|r^*\\|_1$",
            (values["beta"].max(), truth),
            (0, 4),
            textcoords="offset points",
            color=TRUTH,
            ha="right",
        )
        left.set(xlabel="$\\beta$", ylabel="value of Equation (1)", title="The surrogate falls to zero")
        palette = sns.color_palette("flare", table["arm"].nunique())
        for colour, (_, group) in zip(palette, table.groupby("arm"), strict=True):
            arm = group.iloc[0]
            label = rf"$\hat R={arm['estimate']:+.1f}$, $\sigma={arm['deviation']:.1f}$"
            right.plot(group["beta"], group["d"], color=colour, linewidth=2, label=label)
        right.set(xlabel="$\\beta$", ylabel="$d_i$", title="Its solution: doubtful arms let go first")
        right.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- notebook 02: Theorem 2.4 -----------------------------------------------------------------------


def risk_formulas(table: pd.DataFrame) -> Figure:
    """Theorem 2.4: the closed-form risks against simulated ones."""
    titles = {"free": "Closed forms of Appendix A", "sum_to_one": "Probabilities that sum to one"}
    with canvas(7.2, 3.5, 2, sharey=True) as (figure, panels):
        for axes, (form, title) in zip(panels, titles.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=REFERENCE, linewidth=1)
            for name, group in table[table["form"] == form].groupby("policy"):
                axes.plot(
                    group["formula"],
                    group["simulated"],
                    "o",
                    color=POLICY_COLOURS[name],
                    markersize=5,
                    alpha=0.8,
                    label=name,
                )
            axes.set(xlabel="risk by the formula", title=title, aspect="equal")
        panels[0].set_ylabel("simulated risk")
        panels[0].legend(loc="upper left")
    return figure


def simplex_violations(table: pd.DataFrame, example: Mapping[str, Array]) -> Figure:
    """Theorem 2.4 over distributions: risks of random problems, and one counterexample over epsilon.

    Args:
        table: of `simulations.simplex_search`.
        example: epsilon, vanilla and variance-aware risks, and `interior`, all of the counterexample.
    """
    with canvas(8.8, 3.7, 2) as (figure, (left, right)):
        left.plot([0, 1], [0, 1], color=REFERENCE, linewidth=1)
        inside, outside = table[table["interior"]], table[~table["interior"]]
        violated = outside["z"] > 5
        left.plot(
            outside["vanilla_risk"][~violated],
            outside["variance_aware_risk"][~violated],
            ".",
            color="#aaaaaa",
            markersize=4,
            label="boundary within reach",
        )
        left.plot(
            outside["vanilla_risk"][violated],
            outside["variance_aware_risk"][violated],
            ".",
            color=AWARE,
            markersize=5,
            label="... and the inequality violated (z > 5)",
        )
        left.plot(
            inside["vanilla_risk"],
            inside["variance_aware_risk"],
            ".",
            color=TRUTH,
            markersize=5,
            label="boundary out of reach",
        )
        left.set(
            xlabel="vanilla risk",
            ylabel="variance-aware risk",
            title=f"{len(table)} random problems",
            aspect="equal",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        left.legend(loc="upper left", bbox_to_anchor=(0, -0.18), fontsize=8.5)
        right.plot(example["epsilon"], example["vanilla"], color=VANILLA, linewidth=2)
        right.plot(example["epsilon"], example["variance-aware"], color=AWARE, linewidth=2)
        widest = int(np.argmax(example["variance-aware"] - example["vanilla"]))
        for name in ("vanilla", "variance-aware"):
            right.annotate(
                name,
                (example["epsilon"][widest], example[name][widest]),
                (6, -14),
                textcoords="offset points",
                color=POLICY_COLOURS[name],
            )
        right.axvline(float(example["interior"]), color=TRUTH, linestyle=":")
        right.annotate(
            "theorem holds\nup to here",
            (float(example["interior"]), 0.02),
            (-4, 0),
            textcoords="offset points",
            color=TRUTH,
            ha="right",
            fontsize=8.5,
        )
        right.set(
            xscale="log",
            xlabel="$\\varepsilon$",
            ylabel="risk",
            title="$r^*=(0,1,1)$, $\\sigma^2=(1,4,4)$, uniform $\\pi_0$",
            ylim=(0, None),
        )
    return figure


def trust_regions(
    regions: Mapping[str, Array], optima: Mapping[str, Array], estimates: Array, variances: Array
) -> Figure:
    """Remark 2.3: trust regions around the uniform policy over three arms, and where each optimum lies.

    Args:
        regions: a name to the constraint's value, relative to its bound, on `simplex_grid` points.
        optima: a name to the policy (3,) that maximizes the estimates in it.
        estimates: R-hat (3,), for the arrow of increasing reward.
        variances: sigma^2 (3,), for the corners' labels.
    """
    points = simplex_grid()
    x, y = _ternary(points)
    colours = dict(zip(regions, (VANILLA, "#56B4E9", AWARE, EXACT, GRPO), strict=False))
    with canvas(6.6, 4.6) as (figure, (axes,)):
        corners = _ternary(np.eye(3))
        axes.plot([*corners[0], corners[0][0]], [*corners[1], corners[1][0]], color="black", linewidth=1)
        for name, value in regions.items():
            axes.tricontour(x, y, value, levels=[1.0], colors=[colours[name]], linewidths=2)
            axes.plot(
                *_ternary(optima[name]),
                "o",
                color=colours[name],
                markersize=7,
                markeredgecolor="white",
                label=name,
            )
        axes.plot(
            *_ternary(np.ones(3) / 3),
            "+",
            color=REFERENCE,
            markersize=12,
            markeredgewidth=2,
            label="reference",
        )
        for k, (cx, cy) in enumerate(zip(*corners, strict=True)):
            axes.annotate(
                f"arm {k + 1}\n$\\hat R={estimates[k]:g}$, $\\sigma^2={variances[k]:g}$",
                (cx, cy),
                (0, 10 if cy > 0 else -26),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set(aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.16, 1.04))
        axes.axis("off")
        axes.legend(loc="center left", bbox_to_anchor=(0.88, 0.62), fontsize=8.5)
    return figure


def simplex_grid(steps: int = 160) -> Array:
    """Return an even grid of distributions over three arms, (points, 3), off the boundary."""
    first, second = np.meshgrid(np.arange(1, steps), np.arange(1, steps))
    keep = first + second < steps
    a, b = first[keep] / steps, second[keep] / steps
    return np.stack([a, b, 1 - a - b], axis=-1)


def _ternary(policies: Array) -> tuple[Array, Array]:
    return policies[..., 1] + 0.5 * policies[..., 2], np.sqrt(0.75) * policies[..., 2]


def risk_frontier(
    frontier: pd.DataFrame, shown: Sequence[float], equal_step: pd.DataFrame, crossing: float, step: float
) -> Figure:
    """Remark 2.5: mean gain against risk over all radii, and both at equal step length.

    Args:
        frontier: columns level, epsilon, policy, step, gain, risk, averaged over problems.
        shown: the noise levels of the left panel.
        equal_step: columns level, and gain and risk of either policy, averaged over problems.
        crossing: noise level at which the two mean gains are equal; NaN if there is none.
        step: the step length of the right panel.
    """
    with canvas(9.4, 3.6, 2, width_ratios=[1.1, 1]) as (figure, (left, right)):
        for level in shown:
            for name, path in frontier[frontier["level"] == level].groupby("policy"):
                path = path.sort_values("step")
                colour = POLICY_COLOURS[str(name)]
                left.plot(path["risk"], path["gain"], "-", color=colour, marker=".", label=name)
            end = path.iloc[-1]
            left.annotate(
                f"noise {level:g}",
                (end["risk"], end["gain"]),
                (6, 4),
                textcoords="offset points",
                fontsize=8.5,
            )
        handles, labels = left.get_legend_handles_labels()
        left.legend(handles[:2], labels[:2], loc="upper right", fontsize=8.5)
        left.set(
            xlabel="risk of underperforming",
            ylabel="mean gain over the reference",
            title="From a small step to greedy, three noise levels",
        )
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.margins(x=0.22)
        for name in ("vanilla", "variance-aware"):
            colour = POLICY_COLOURS[name]
            for column, style in (("gain", "-"), ("risk", "--")):
                values = equal_step[f"{name} {column}"]
                label = f"{column}, {name}"
                right.plot(equal_step["level"], values, style, color=colour, lw=2, label=label)
        if np.isfinite(crossing):
            right.axvline(crossing, color=REFERENCE, linestyle=":")
            right.annotate(
                f"equal gain\nat noise {crossing:.2f}",
                (crossing, 0.98),
                (4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8.5,
                color=REFERENCE,
                va="top",
            )
        right.set(
            xscale="log",
            xlabel=r"noise level (1: $\mathrm{E}\,\sigma^2 = \mathrm{Var}\, r^*$)",
            title=rf"At equal step, $\|\pi-\pi_0\|^2={step:g}$",
        )
        right.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- notebook 02: Theorem 2.7 -----------------------------------------------------------------------


def constrained_policies(policies: Mapping[str, Array], estimates: Array, shifts: pd.DataFrame) -> Figure:
    """Theorem 2.7: the policies at one constraint value, and what a constant does to them.

    Args:
        policies: a name to pi (arms,).
        estimates: R-hat (arms,).
        shifts: columns policy, shift, probability: of the first arm, at fixed beta.
    """
    with canvas(9.0, 3.8, 2) as (figure, (left, right)):
        _policy_bars(left, policies, estimates)
        left.set(title="At the same $\\mathrm{E}[\\sigma^2 \\ln(\\pi/\\pi_0)]$", xlabel="arm")
        handles, labels = left.get_legend_handles_labels()
        left.legend(
            handles,
            [label.replace("return", "$\\mathrm{E}\\,\\hat R$") for label in labels],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
            fontsize=8.5,
        )
        for name, group in shifts.groupby("policy", sort=False):
            right.plot(
                group["shift"],
                group["probability"],
                color=POLICY_COLOURS[str(name)],
                linewidth=2,
                label=str(name),
            )
        right.set(
            xlabel="constant added to all rewards",
            ylabel="probability of the noisy arm",
            title="Shift test at fixed $\\beta$",
            ylim=(-0.03, 1.03),
        )
        right.legend(fontsize=8.5, loc="upper right")
    return figure


def optimality_gap(table: pd.DataFrame) -> Figure:
    """Theorem 2.7: share of the attainable gain that the printed policy loses at the same constraint."""
    with canvas(6.0, 3.4) as (figure, (axes,)):
        order = sorted(table["shift"].unique())
        for k, shift in enumerate(order):
            lost = table.loc[table["shift"] == shift, "share_lost"]
            places = k + np.linspace(-0.3, 0.3, len(lost))
            axes.plot(places, lost, ".", color=PRINTED, markersize=3, alpha=0.5)
        medians = table.groupby("shift")["share_lost"].median()
        for k, shift in enumerate(order):
            axes.plot([k - 0.3, k + 0.3], [medians[shift]] * 2, color="black", linewidth=2)
            axes.annotate(f"{100 * medians[shift]:.0f}%", (k + 0.32, medians[shift]), fontsize=9, va="center")
        axes.set(
            xticks=range(len(order)),
            xticklabels=[f"{shift:+g}" if shift else "0" for shift in order],
            xlabel="constant added to all rewards",
            ylabel="share of the gain lost",
            ylim=(-0.05, 1.05),
            title=f"Loss of the printed form, {table['instance'].nunique()} problems (bars: medians)",
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def weighted_divergence(path: pd.DataFrame, limits: pd.DataFrame) -> Figure:
    """Why a variance-weighted KL is not a divergence, and what that does at large beta.

    Args:
        path: columns share (0 the reference, 1 the minimizer), weighted, bregman: penalties on the way.
        limits: columns policy, beta, kl: distance from the reference.
    """
    with canvas(8.8, 3.5, 2) as (figure, (left, right)):
        left.axhline(0, color="black", linewidth=0.8)
        for column, colour, label in (
            ("weighted", EXACT, "$\\mathrm{E}[\\sigma^2\\ln(\\pi/\\pi_0)]$"),
            ("bregman", AWARE, "Bregman form of PPO's fixed point"),
        ):
            left.plot(path["share"], path[column], color=colour, linewidth=2)
            end = path.iloc[len(path) * 2 // 3]
            left.annotate(
                label,
                (end["share"], end[column]),
                (-8, 10) if column == "bregman" else (-18, -16),
                textcoords="offset points",
                color=colour,
                ha="right",
                fontsize=9,
            )
        left.set(
            xlabel="from the reference (0) to the penalty's minimizer (1)",
            ylabel="penalty",
            title="The weighted penalty pays for leaving $\\pi_0$",
        )
        for name, group in limits.groupby("policy", sort=False):
            right.plot(
                group["beta"],
                np.maximum(group["kl"], 1e-9),
                color=POLICY_COLOURS[str(name)],
                linewidth=2,
                label=str(name),
            )
        right.set(
            xscale="log",
            yscale="log",
            ylim=(1e-6, 3),
            xlabel="$\\beta$",
            ylabel="$\\mathrm{KL}(\\pi\\,\\|\\,\\pi_0)$ (nats)",
            title="A large β does not bring the true optimum back",
        )
        right.legend(fontsize=8.5, loc="center left")
    return figure


# --- notebook 02: Figure 4 --------------------------------------------------------------------------


def figure_4(
    panels: Mapping[str, tuple[Array, Array]], ratios: Mapping[str, Estimate], printed: Mapping[str, float]
) -> Figure:
    """Figure 4: distribution of the returns in the high and the low variability setting.

    Args:
        panels: a range of variances to the gains (vanilla, variance-aware), each (draws,).
        ratios: the same range to the ratio of their variances.
        printed: the same range to the paper's ratio.
    """
    with canvas(8.8, 3.3, len(panels)) as (figure, axes_list):
        for axes, (name, gains) in zip(axes_list, panels.items(), strict=True):
            low, high = np.quantile(np.concatenate(gains), [0.001, 1])
            edges = np.linspace(low, high, 80)
            for policy, gain in zip(("vanilla", "variance-aware"), gains, strict=True):
                _shares(axes, gain, edges, POLICY_COLOURS[policy], policy)
            ratio = ratios[name]
            interval = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            axes.set(
                title=f"Variances from {name}\nratio {interval}, paper {printed[name]:g}",
                xlabel="gain over the reference policy",
            )
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes_list[0].set_ylabel("share of draws")
        axes_list[0].legend(loc="upper center", fontsize=9)
    return figure


def variance_ratios(table: pd.DataFrame, printed: Mapping[str, float]) -> Figure:
    """Show Figure 4's ratio over random settings, raw and at equal mean gain.

    Args:
        table: of `simulations.variance_ratios`.
        printed: a range of variances to the paper's ratio.
    """
    columns = {
        "ratio": (-0.17, AWARE, "as it is (5-95%, quartiles, median)"),
        "equal_gain_ratio": (0.17, VANILLA, "at equal mean gain"),
    }
    with canvas(9.2, 3.9, 2, sharey=True) as (figure, panels):
        for axes, (name, paper) in zip(panels, printed.items(), strict=True):
            groups = table[table["range"] == name].groupby(["arms", "signal"])
            for k, (_, group) in enumerate(groups):
                for column, (offset, colour, label) in columns.items():
                    _quantile_bar(axes, k + offset, group[column], colour, "" if k else label)
            axes.axhline(paper, color="black", linestyle=":")
            axes.axhline(1, color=REFERENCE, linewidth=1)
            right = (1.0, paper)
            place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"paper {paper:g}", right, (0, 3), ha="right", fontsize=8.5, **place)
            labels = [f"{arms}\n{signal:g}" for arms, signal in groups.groups]
            axes.set(
                yscale="log", title=f"variances from {name}", xlabel="arms\nand $s$ of $r^*\\sim N(0, s^2)$"
            )
            axes.set_xticks(range(len(labels)), labels)
        panels[0].set(ylabel="Var(vanilla) / Var(variance-aware)", yticks=[0.5, 1, 2, 5, 10, 20, 50])
        panels[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panels[1].legend(loc="upper right", fontsize=8.5)
    return figure


def _quantile_bar(axes: Axes, place: float, values: pd.Series, colour: str, label: str) -> None:
    low, first, median, third, high = values.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([place] * 2, [low, high], color=colour, linewidth=1.5)
    axes.plot([place] * 2, [first, third], color=colour, linewidth=5, label=label or None)
    axes.plot(place, median, "o", color="white", markeredgecolor=colour, markersize=5)


def matched_kl(summary: pd.DataFrame, target: float) -> Figure:
    """Gain, variance and risk of the policies less vanilla's at the same mean KL, over noise levels.

    Args:
        summary: columns level, policy, gain, log_variance, risk, all relative to vanilla, each with
            _low and _high.
        target: the KL, in nats.
    """
    titles = {
        "gain": "mean gain, less vanilla's",
        "log_variance": "variance of the return, over vanilla's",
        "risk": "risk, less vanilla's",
    }
    with canvas(10.4, 3.3, 3) as (figure, panels):
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            change = np.exp if column == "log_variance" else np.asarray
            for name, group in summary.groupby("policy", sort=False):
                colour, levels = POLICY_COLOURS[str(name)], group["level"]
                axes.plot(levels, change(group[column]), color=colour, linewidth=2, label=str(name))
                low, high = change(group[f"{column}_low"]), change(group[f"{column}_high"])
                axes.fill_between(levels, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.axhline(float(change(0.0)), color=VANILLA, linewidth=1.5)
            axes.set(xscale="log", xlabel="noise level", title=title)
        panels[1].set_ylim(0, None)
        panels[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        handles, labels = panels[0].get_legend_handles_labels()
        panels[2].legend(
            handles,
            labels,
            fontsize=8.5,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            title=f"KL = {target:g} nats\n(blue line: vanilla)",
            title_fontsize=8.5,
        )
    return figure
