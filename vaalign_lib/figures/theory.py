"""One function per figure of notebooks 01 and 02: tidy data in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaalign_lib.figures import style
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, proportion
from vaalign_lib.theory import bounds as theory
from vaalign_lib.theory.bandit import FORMS, Bandit, typical_reversed_estimates

PAIR = ("vanilla", "variance-aware")


def bandit_arms(bandit: Bandit, estimates: Array) -> Figure:
    """Figure 2: the arms with their estimates and uncertainty, and the two policies they lead to.

    `bandit`: the arms; `estimates`: R-hat (draws, arms); the mean of those in fully reversed order is
    shown.
    """
    shown = typical_reversed_estimates(bandit, estimates)
    arms = np.arange(1, bandit.rewards.size + 1)
    policies = {"reference": bandit.reference, "vanilla": bandit.vanilla(shown)}
    policies["variance-aware"] = bandit.variance_aware(shown)
    with style.canvas(7.4, 3.7, 2) as (figure, (left, right)):
        spread = 1.96 * np.asarray(bandit.deviations)
        left.errorbar(arms, shown, spread, fmt="o", color=style.SERIES[0], capsize=6, markersize=8)
        left.plot(arms, bandit.rewards, "D", color=style.TRUTH, markersize=7)
        style.label(left, arms[0], shown[0], "estimate, ±1.96σ", style.SERIES[0], offset=(10, 0))
        style.label(left, arms[0], bandit.rewards[0], "true reward", style.TRUTH, offset=(10, 0))
        left.set(xlabel="arm", ylabel="reward", xticks=arms, xlim=(0.6, arms[-1] + 0.5))
        left.set_title("Estimates in fully reversed order")
        _policy_bars(right, policies, "Policies from these estimates")
        right.legend(loc="upper right")
        returns = ", ".join(f"{policy @ bandit.rewards:.2f} ({name})" for name, policy in policies.items())
        style.headline(figure, f"True returns where the estimates mislead: {returns}")
    return figure


def _policy_bars(axes: Axes, policies: Mapping[str, Array], title: str) -> None:
    arms, width = np.arange(1, policies["reference"].size + 1), 0.8 / len(policies)
    for k, (name, policy) in enumerate(policies.items()):
        place = arms + (k - (len(policies) - 1) / 2) * width
        bars = axes.bar(place, policy, 0.92 * width, color=style.POLICY_COLOURS[name], label=name)
        if len(policies) <= 3:
            axes.bar_label(bars, [f"{p:.2f}" for p in policy], fontsize=8, padding=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(title=title, xlabel="arm", ylabel="probability", xticks=arms)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)


def bandit_returns(
    bandit: Bandit, samples: Mapping[str, tuple[Array, Array]], printed: Sequence[float], width: float = 7.6
) -> Figure:
    """Figure 3: the distribution of the true return of both policies over draws of the estimates.

    `bandit`: the arms; `samples`: a panel title to the returns (vanilla, variance-aware), each (draws,);
    `printed`: the paper's risks of the two policies; `width`: of the figure, in inches.
    """
    tail = 0.002 if bandit.form == "free" else 0.0  # the closed form's returns have long tails
    limits = np.array([np.quantile(v, [tail, 1 - tail]) for pair in samples.values() for v in pair])
    edges, base = np.linspace(limits[:, 0].min(), limits[:, 1].max(), 51), bandit.base_return
    with style.canvas(width, 3.9, len(samples), sharex=True, sharey=True) as (figure, panels):
        for axes, (title, returns) in zip(panels, samples.items(), strict=True):
            found = []
            for k, (name, values, paper) in enumerate(zip(PAIR, returns, printed, strict=True)):
                colour, risk = style.POLICY_COLOURS[name], proportion(values <= base)
                style.shares(axes, values, edges, colour)
                found.append(f"{100 * risk.value:.2f}%")
                interval = f"{found[k]} [{100 * risk.low:.2f}, {100 * risk.high:.2f}]"
                style.note(axes, f"{name}: {interval}, paper {100 * paper:g}%", "upper left", colour, k)
            axes.axvline(base, color=style.REFERENCE, linewidth=2, ymax=0.8)
            axes.set(title=title, xlabel="return $\\pi^\\top r^*$ under the true rewards")
            style.percent(axes.yaxis)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        top = 1.35 * panels[0].get_ylim()[1]
        panels[0].set(ylabel="share of draws", ylim=(0, top))
        place = {"offset": (-4, 0), "ha": "right"}
        style.label(panels[0], base, 0.72 * top, f"base policy\n{base:.4f}", style.REFERENCE, **place)
        said = " and ".join(f"{100 * paper:g}%" for paper in printed)
        style.headline(
            figure,
            f"Below the base policy in {found[0]} of the draws (vanilla) and {found[1]} (variance-aware); "
            f"the paper: {said}",
        )
    return figure


def bandit_forms(
    table: pd.DataFrame, printed: tuple[float, float], ranges: Sequence[tuple[float, float]]
) -> Figure:
    """Risks of both policies under every form, beside the printed ones, and the reversed draws.

    `table`: columns form, vanilla, vanilla_low, vanilla_high, the same for aware, and reversed_gain, the
    share of the draws in fully reversed order that leave the variance-aware policy above the base policy
    (NaN if there is no such draw); `printed`: the paper's two risks; `ranges`: what rounds to each of them.
    """
    with style.canvas(7.6, 3.9, 3, sharey=True) as (figure, (*panels, last)):
        rows = style.lines_of(panels[0], [FORMS[form] for form in table["form"]])
        reach = pd.Series(True, index=table.index)
        columns = zip(panels, ("vanilla", "aware"), PAIR, printed, ranges, strict=True)
        for axes, column, name, paper, (low, high) in columns:
            axes.axvspan(low, high, color=style.PRINTED, alpha=0.25, linewidth=0)
            style.forest(axes, table, rows, column, style.POLICY_COLOURS[name], capsize=3)
            ends = style.ends(table, column)
            reach &= (ends[0] <= high) & (ends[1] >= low)
            axes.set_title(f"risk, {name}\n(shaded: rounds to {100 * paper:g}%)")
            style.percent(axes.xaxis, 1 if paper > 0.1 else 3)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(x=0.1)
        gained = table["reversed_gain"]
        last.barh(rows, gained.fillna(0), color=style.AWARE, height=0.55)
        inside = {"colour": "white", "ha": "right", "offset": (-4, 0)}
        for row, value in zip(rows, gained, strict=True):
            place = inside if value > 0.7 else {"colour": "black", "ha": "left"}
            style.label(last, value if value > 0.7 else 0, row, f"{100 * value:.1f}%", **place)
        last.set(title="variance-aware gains on\nreversed estimates", xlim=(0, 1), xticks=[0, 0.5, 1])
        style.percent(last.xaxis)
        style.headline(
            figure,
            f"Both risks can round to the printed ones in {reach.sum()} of {len(table)} forms; most reversed "
            f"estimates gain in {(gained > 0.5).sum()}. 95% intervals.",
        )
    return figure


def bandit_shift(table: pd.DataFrame) -> Figure:
    """Risk of the variance-aware policy when a constant is added to every reward.

    `table`: columns form, shift, risk, low, high.
    """
    colours = {"printed": style.PRINTED, "exact": style.EXACT, "vanilla": style.VANILLA}
    with style.canvas(5.8, 3.8) as (figure, (axes,)):
        for form, group in table.groupby("form", sort=False):
            colour, first = colours[str(form)], form == "printed"
            style.band(axes, group, "shift", "risk", colour, linewidth=2)
            end = group.iloc[0 if first else -1]
            place = {"offset": (8 if first else 0, 8), "ha": "left" if first else "right", "fontsize": 10}
            style.label(axes, end["shift"], end["risk"], FORMS.get(str(form), "vanilla"), colour, **place)
        axes.axvline(0, color=style.REFERENCE, linewidth=1, linestyle=":")
        axes.set(xlabel="constant added to all rewards", ylabel="risk of underperforming", ylim=(-0.03, 1.0))
        style.percent(axes.yaxis)
        low, high = (table.groupby("form")["risk"].agg(end) for end in ("min", "max"))
        names = {"printed": "as printed", "exact": "true optimum"}
        spans = "; ".join(f"{name} {low[form]:.1%} to {high[form]:.1%}" for form, name in names.items())
        style.headline(figure, f"Risk over zero points of the rewards: {spans}")
    return figure


def lower_bound_probabilities(table: pd.DataFrame) -> Figure:
    """Theorem 2.2: printed bound, proof's bound, sharp bounds and simulated probabilities over beta."""
    arms, signals = sorted(table["arms"].unique()), sorted(table["signal"].unique())
    greys = sns.color_palette("Greys", len(signals) + 1)[1:]
    betas = np.geomspace(table["beta"].min(), table["beta"].max(), 300)
    with style.grid(len(arms), 3, 7.2, 2.5, sharey=True) as (figure, panels):
        for axes, count in zip(panels, arms, strict=True):
            low, high = theory.lower_bound(count, betas), theory.upper_bound(betas)
            axes.fill_between(betas, low, high, color=style.TRUTH, alpha=0.18, linewidth=0)
            for values, line, colour, text in (
                (low, "-", style.TRUTH, r"sharp: $F_n(\beta^2)$, $\Phi(\beta)$"),
                (high, "-", style.TRUTH, None),
                (theory.printed_bound(count, betas), "--", style.PRINTED, "as printed"),
                (theory.proof_bound(count, betas), "-.", style.GRPO, "as the proof gives it"),
            ):
                axes.plot(betas, values, line, color=colour, label=text)
            for colour, signal in zip(greys, signals, strict=True):
                one = table[(table["arms"] == count) & (table["signal"] == signal)]
                text = rf"simulated, $|r^*|={signal:g}\sigma$"
                axes.plot(one["beta"], one["probability"], ".", color=colour, label=text)
            axes.set(xscale="log", xlabel=r"$\beta$", title="1 arm" if count == 1 else f"{count} arms")
        panels[0].set_ylabel("probability of the inequality")
        broken = {name: (table["high"] < table[name]).sum() for name in ("printed", "proof", "sharp_lower")}
        style.headline(
            figure,
            f"Of {len(table)} simulated probabilities, {broken['printed']} lie below the printed bound, "
            f"{broken['proof']} below the proof's, {broken['sharp_lower']} below the sharp one (95%)",
        )
        style.legend_outside(figure, panels[0], 3)
    return figure


def box_solution(table: pd.DataFrame, truth: float) -> Figure:
    """Equation (1) on the box: its value and its solution over beta.

    `table`: columns beta, value, arm, estimate, d; `truth`: sup of r*' d, the right side of Theorem 2.2.
    """
    with style.canvas(7.4, 3.8, 2) as (figure, (left, right)):
        values = table.drop_duplicates("beta")
        left.plot(values["beta"], values["value"], color=style.AWARE, linewidth=2)
        left.axhline(truth, color=style.TRUTH)
        text = "$\\sup_d\\, r^{*\\top} d = 2\\|r^*\\|_1$"
        style.label(left, values["beta"].max(), truth, text, style.TRUTH, offset=(0, 9), ha="right")
        left.set(xlabel="$\\beta$", ylabel="value of Equation (1)", title="Value")
        leaves = {}
        palette = sns.color_palette("flare", table["arm"].nunique())
        for colour, (_, group) in zip(palette, table.groupby("arm"), strict=True):
            arm = group.iloc[0]
            text = rf"$\hat R={arm['estimate']:+.1f}$, $\sigma={arm['deviation']:.1f}$"
            right.plot(group["beta"], group["d"], color=colour, linewidth=2, label=text)
            corner = group.loc[group["d"].abs() > group["d"].abs().max() - 1e-6, "beta"].max()
            leaves[corner] = f"{abs(arm['estimate']) / arm['deviation'] ** 2:.1f}"
        right.set(xlabel="$\\beta$", ylabel="$d_i$", title="Solution")
        order = ", ".join(leaves[corner] for corner in sorted(leaves))
        zero = values.loc[values["value"] < 1e-9, "beta"].min()
        style.headline(
            figure,
            f"The surrogate is zero from $\\beta$ = {zero:.1f} on; arms leave the corner in the order of "
            f"$|\\hat{{R}}|/\\sigma^2$: {order}",
        )
        style.legend_outside(figure, right, 2)
    return figure


def risk_formulas(table: pd.DataFrame) -> Figure:
    """Theorem 2.4: the closed-form risks against simulated ones."""
    titles = {"free": "Closed forms of Appendix A", "sum_to_one": "Probabilities that sum to one"}
    with style.canvas(6.6, 3.8, 2, sharey=True) as (figure, panels):
        for axes, (form, title) in zip(panels, titles.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=style.REFERENCE, linewidth=1)
            for (name, group), mark in zip(table[table["form"] == form].groupby("policy"), "os", strict=True):
                colour = style.POLICY_COLOURS[str(name)]
                axes.plot(group["formula"], group["simulated"], mark, color=colour, alpha=0.7, label=name)
            top = 1.05 * table[["formula", "simulated"]].to_numpy().max()
            axes.set(xlabel="risk by the formula", title=title, aspect="equal", xlim=(0, top), ylim=(0, top))
        panels[0].set_ylabel("simulated risk")
        panels[0].legend(loc="upper left")
        apart = (table["formula"] - table["simulated"]).abs().max()
        style.headline(figure, f"Formula and simulation differ by at most {apart:.4f} in {len(table)} cases")
    return figure


def simplex_violations(table: pd.DataFrame, example: Mapping[str, Array]) -> Figure:
    """Theorem 2.4 over distributions: risks of random problems, and one counterexample over epsilon.

    `table`: of `simulations.simplex_search`; `example`: epsilon, vanilla and variance-aware risks, and
    `interior`, all of the counterexample.
    """
    inside, violated = table["interior"], table["z"] > 5
    clouds = {
        "boundary within reach": (~inside & ~violated, "#aaaaaa"),
        "... and the inequality violated (z > 5)": (~inside & violated, style.PRINTED),
        "boundary out of reach": (inside, style.TRUTH),
    }
    with style.canvas(7.4, 4.3, 2) as (figure, (left, right)):
        left.plot([0, 1], [0, 1], color=style.REFERENCE, linewidth=1)
        for name, (chosen, colour) in clouds.items():
            rows = table[chosen]
            left.plot(rows["vanilla_risk"], rows["variance_aware_risk"], ".", color=colour, ms=5, label=name)
        left.set(xlabel="vanilla risk", ylabel="variance-aware risk", title="Random problems")
        left.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
        widest = int(np.argmax(example["variance-aware"] - example["vanilla"]))
        for name in PAIR:
            right.plot(example["epsilon"], example[name], color=style.POLICY_COLOURS[name], linewidth=2)
            at = example["epsilon"][widest], example[name][widest]
            style.label(right, *at, name, style.POLICY_COLOURS[name], offset=(6, -10))
        edge = float(example["interior"])
        right.axvline(edge, color=style.TRUTH, linestyle=":")
        style.label(right, edge, 0.02, "theorem holds\nup to here", style.TRUTH, offset=(-4, 4), ha="right")
        right.set(xscale="log", xlabel="$\\varepsilon$", ylabel="risk", ylim=(0, None))
        right.set_title("$r^*=(0,1,1)$, $\\sigma^2=(1,4,4)$, uniform $\\pi_0$")
        style.headline(
            figure,
            f"Violated in {(~inside & violated).sum()} of {(~inside).sum()} problems with the boundary "
            f"within reach, in {(inside & violated).sum()} of {inside.sum()} others",
        )
        style.legend_outside(figure, left, 3)
    return figure


def trust_regions(
    regions: Mapping[str, Array], optima: Mapping[str, Array], estimates: Array, variances: Array
) -> Figure:
    """Remark 2.3: trust regions around the uniform policy over three arms, and where each optimum lies.

    `regions`: a name to the constraint's value, relative to its bound, on `simplex_grid` points; `optima`:
    a name to the policy (3,) that maximizes the estimates in it; `estimates`: R-hat (3,), for the arrow of
    increasing reward; `variances`: sigma^2 (3,), for the corners' labels.
    """
    x, y = _ternary(simplex_grid())
    noisy = int(np.argmax(variances))
    colours = (style.VANILLA, style.PESSIMIST, style.AWARE, style.EXACT)
    with style.canvas(6.2, 4.8) as (figure, (axes,)):
        axes.plot(*_ternary(np.eye(3)[[0, 1, 2, 0]]), color="black", linewidth=1)
        for colour, (name, value) in zip(colours, regions.items(), strict=True):
            axes.tricontour(x, y, value, levels=[1.0], colors=[colour], linewidths=2)
            text = f"{name}: {optima[name][noisy]:.2f}"
            axes.plot(*_ternary(optima[name]), "o", color=colour, markersize=7, mec="white", label=text)
        centre = _ternary(np.ones(3) / 3)
        axes.plot(*centre, "+", color=style.REFERENCE, ms=12, mew=2, label=f"reference: {1 / 3:.2f}")
        for k, (cx, cy) in enumerate(zip(*_ternary(np.eye(3)), strict=True)):
            text = f"arm {k + 1}\n$\\hat R={estimates[k]:g}$, $\\sigma^2={variances[k]:g}$"
            style.label(axes, cx, cy, text, "black", offset=(0, 18 if cy > 0 else -18), ha="center")
        axes.set(aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.16, 1.04))
        axes.axis("off")
        axes.legend(loc="upper left", bbox_to_anchor=(0.68, 0.9), title=f"probability of arm {noisy + 1}")
        (low, quiet), *_, (high, loud) = sorted((policy[noisy], name) for name, policy in optima.items())
        style.headline(figure, f"The noisy arm keeps {low:.2f} ({quiet}) to {high:.2f} ({loud})")
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

    `frontier`: columns level, epsilon, policy, step, gain, risk, averaged over problems; `shown`: the noise
    levels of the left panel; `equal_step`: columns level, and gain and risk of either policy, averaged over
    problems; `crossing`: noise level at which the two mean gains are equal; NaN if there is none; `step`:
    the step length of the other panels.
    """
    with style.canvas(8.0, 3.8, 3) as (figure, (left, *others)):
        for level in shown:
            paths = frontier[frontier["level"] == level].sort_values("step")
            _curves(left, paths, "risk", "gain", ".-")
            risk, gain = paths.groupby("policy")[["risk", "gain"]].last().loc[list(PAIR)].max()
            style.label(left, risk, gain, f"noise {level:g}", "black", offset=(5, 0))
        left.set(xlabel="risk of underperforming", ylabel="mean gain over the reference")
        left.set_title("Small step to greedy")
        style.percent(left.xaxis)
        highest = frontier.loc[frontier["level"].isin(shown), "risk"].max()
        left.set_xlim(-0.08 * highest, 1.65 * highest)  # room for the names
        for axes, column in zip(others, ("gain", "risk"), strict=True):
            for name in PAIR:
                values = equal_step[f"{name} {column}"]
                axes.plot(equal_step["level"], values, ".-", color=style.POLICY_COLOURS[name], label=name)
            if np.isfinite(crossing):
                axes.axvline(crossing, color=style.REFERENCE, linestyle=":")
            axes.set(xscale="log", xlabel=r"noise level", ylabel=f"mean {column}")
            axes.set_title(rf"At $\|\pi-\pi_0\|^2={step:g}$")
        style.percent(others[1].yaxis)
        lower = (equal_step["variance-aware risk"] <= equal_step["vanilla risk"]).sum()
        at = f"above noise {crossing:.2f} (dotted)" if np.isfinite(crossing) else "at no noise level"
        style.headline(
            figure,
            f"At equal step variance-aware risk is not above vanilla's at {lower} of {len(equal_step)} "
            f"noise levels; its mean gain is larger {at}. "
            r"Noise 1: $\mathrm{E}\,\sigma^2=\mathrm{Var}\,r^*$.",
        )
        style.legend_outside(figure, others[0], 2)
    return figure


def _curves(axes: Axes, table: pd.DataFrame, x: str, y: str, line: str = "-", **look: Any) -> None:
    """Draw a line for every policy, in its colour."""
    for name, group in table.groupby("policy", sort=False):
        axes.plot(group[x], group[y], line, color=style.POLICY_COLOURS[str(name)], label=name, **look)


def constrained_policies(policies: Mapping[str, Array], estimates: Array, shifts: pd.DataFrame) -> Figure:
    """Theorem 2.7: the policies at one constraint value, and what a constant does to them.

    `policies`: a name to pi (arms,); `estimates`: R-hat (arms,); `shifts`: columns policy, shift,
    probability: of the first arm, at fixed beta.
    """
    with style.canvas(7.6, 4.0, 2) as (figure, (left, right)):
        _policy_bars(left, policies, "At the same $\\mathrm{E}[\\sigma^2 \\ln(\\pi/\\pi_0)]$")
        _curves(right, shifts, "shift", "probability", linewidth=2)
        right.lines[list(shifts["policy"].unique()).index("GRPO fixed point")].set_linewidth(4)  # as PPO's
        right.set(xlabel="constant added to all rewards", ylabel="probability of the noisy arm")
        right.set(title="Shift test at fixed $\\beta$", ylim=(-0.03, 1.03))
        means = ", ".join(f"{policy @ estimates:.2f} ({name})" for name, policy in policies.items())
        moved = shifts.groupby("policy")["probability"].agg(np.ptp)
        style.headline(
            figure,
            f"Estimated reward at the same constraint: {means}. "
            f"A constant moves: {', '.join(moved[moved > 1e-6].index) or 'none'}.",
        )
        style.legend_outside(figure, left, 3)
    return figure


def optimality_gap(table: pd.DataFrame) -> Figure:
    """Theorem 2.7: share of the attainable gain that the printed policy loses at the same constraint."""
    with style.canvas(6.0, 3.7) as (figure, (axes,)):
        medians = table.groupby("shift")["share_lost"].median()
        for k, (shift, median) in enumerate(medians.items()):
            lost = table.loc[table["shift"] == shift, "share_lost"]
            places = k + np.linspace(-0.3, 0.3, len(lost))
            axes.plot(places, lost, ".", color=style.PRINTED, markersize=3, alpha=0.5)
            axes.plot([k - 0.3, k + 0.3], [median] * 2, color="black", linewidth=2)
            style.label(axes, k + 0.32, median, f"{100 * median:.0f}%", "black", fontsize=10)
        names = [f"{shift:+g}" if shift else "0" for shift in medians.index]
        axes.set_xticks(range(len(names)), names)
        axes.set(xlabel="constant added to all rewards", ylabel="share of the gain lost", ylim=(-0.05, 1.05))
        style.percent(axes.yaxis)
        style.headline(
            figure,
            f"The printed form loses {medians.min():.0%} to {medians.max():.0%} of the gain, by the zero "
            f"point of the rewards (bars: medians of {table['instance'].nunique()} problems)",
        )
    return figure


def weighted_divergence(path: pd.DataFrame, limits: pd.DataFrame) -> Figure:
    """Why a variance-weighted KL is not a divergence, and what that does at large beta.

    `path`: columns share (0 the reference, 1 the minimizer), weighted, bregman: penalties on the way;
    `limits`: columns policy, beta, kl: distance from the reference.
    """
    with style.canvas(7.6, 4.0, 2) as (figure, (left, right)):
        left.axhline(0, color="black", linewidth=0.8)
        for column, colour, text, offset in (
            ("weighted", style.EXACT, "$\\mathrm{E}[\\sigma^2\\ln(\\pi/\\pi_0)]$", (-14, -12)),
            ("bregman", style.AWARE, "PPO's: Bregman form", (-8, 14)),
        ):
            left.plot(path["share"], path[column], color=colour, linewidth=2)
            at = path.iloc[len(path) * 2 // 3]
            style.label(left, at["share"], at[column], text, colour, offset=offset, ha="right")
        left.set(xlabel="from the reference (0) to\nthe penalty's minimizer (1)", ylabel="penalty")
        _curves(right, limits.assign(kl=limits["kl"].clip(lower=1e-9)), "beta", "kl", linewidth=2)
        right.set(xscale="log", yscale="log", ylim=(1e-6, 3), xlabel="$\\beta$")
        right.set_ylabel("$\\mathrm{KL}(\\pi\\,\\|\\,\\pi_0)$ (nats)")
        last = limits.sort_values("beta").groupby("policy")["kl"].last()
        style.headline(
            figure,
            f"The weighted penalty falls to {path['weighted'].min():.2f}; at $\\beta$ = "
            f"{limits['beta'].max():g} these stay away from $\\pi_0$: "
            f"{', '.join(last[last > 1e-3].index) or 'none'}",
        )
        style.legend_outside(figure, right, 2)
    return figure


def figure_4(
    panels: Mapping[str, tuple[Array, Array]], ratios: Mapping[str, Estimate], printed: Mapping[str, float]
) -> Figure:
    """Figure 4: distribution of the returns in the high and the low variability setting.

    `panels`: a range of variances to the gains (vanilla, variance-aware), each (draws,); `ratios`: the same
    range to the ratio of their variances; `printed`: the same range to the paper's ratio.
    """
    with style.canvas(7.4, 3.7, len(panels)) as (figure, places):
        for axes, (name, gains) in zip(places, panels.items(), strict=True):
            low, high = np.quantile(np.concatenate(gains), [0.001, 1])
            for policy, gain in zip(PAIR, gains, strict=True):
                style.shares(axes, gain, np.linspace(low, high, 80), style.POLICY_COLOURS[policy], policy)
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
            ratio = ratios[name]
            interval = f"ratio {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], paper {printed[name]:g}"
            style.note(axes, interval)
            axes.set(title=f"Variances from {name}", xlabel="gain over the reference policy")
            style.percent(axes.yaxis)
        places[0].set_ylabel("share of draws")
        found = " and ".join(f"{ratio.value:.2f}" for ratio in ratios.values())
        said = " and ".join(f"{value:g}" for value in printed.values())
        style.headline(figure, f"Vanilla's variance is {found} times as large; the paper prints {said}")
        style.legend_outside(figure, places[0], 2)
    return figure


def variance_ratios(table: pd.DataFrame, printed: Mapping[str, float]) -> Figure:
    """Show Figure 4's ratio over random settings, raw and at equal mean gain.

    `table`: of `simulations.variance_ratios`; `printed`: a range of variances to the paper's ratio.
    """
    columns = {
        "ratio": (-0.17, style.SERIES[0], "as it is (5-95%, quartiles, median)"),
        "equal_gain_ratio": (0.17, style.SERIES[1], "at equal mean gain"),
    }
    with style.canvas(7.6, 4.3, 2, sharey=True) as (figure, panels):
        for axes, (name, paper) in zip(panels, printed.items(), strict=True):
            groups = table[table["range"] == name].groupby(["arms", "signal"])
            for k, (_, group) in enumerate(groups):
                for column, (offset, colour, text) in columns.items():
                    _quantile_bar(axes, k + offset, group[column], colour, None if k else text)
            axes.axhline(paper, color=style.PRINTED, linestyle="--")
            axes.axhline(1, color="black", linewidth=0.8)
            style.label(axes, -0.5, paper, f"paper {paper:g}", style.PRINTED, offset=(0, 6))
            style.log_ticks(axes, "y", [0.5, 1, 2, 5, 10, 20, 50])
            names = [f"{arms}\n{signal:g}" for arms, signal in groups.groups]
            axes.set(title=f"variances from {name}", xlabel="arms\nand $s$ of $r^*\\sim N(0, s^2)$")
            axes.set_xticks(range(len(names)), names)
        panels[0].set_ylabel("Var(vanilla) / Var(variance-aware)")
        raw, equal = (table.groupby("range")[column].median() for column in columns)
        medians = "; ".join(f"{raw[name]:.2f} and {equal[name]:.2f} from {name}" for name in printed)
        each = table.groupby(["range", "arms", "signal"]).size().max()
        found = f"as it is and at equal mean gain: {medians} ({each} settings a bar)"
        style.headline(figure, f"Median ratio, {found}")
        style.legend_outside(figure, panels[0], 2)
    return figure


def _quantile_bar(axes: Axes, place: float, values: pd.Series, colour: str, text: str | None) -> None:
    low, first, median, third, high = values.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([place] * 2, [low, high], color=colour, linewidth=1.5)
    axes.plot([place] * 2, [first, third], color=colour, linewidth=5, label=text)
    axes.plot(place, median, "o", color="white", markeredgecolor=colour, markersize=5)


def matched_kl(summary: pd.DataFrame, target: float) -> Figure:
    """Gain, variance and risk of the policies minus vanilla's at the same mean KL, over noise levels.

    `summary`: columns level, policy, gain, log_variance, risk, all relative to vanilla, each with _low and
    _high; `target`: the KL, in nats.
    """
    titles = {
        "gain": "mean gain:\ndifference to vanilla",
        "variance": "variance of the return:\nratio to vanilla",
        "risk": "risk:\ndifference to vanilla",
    }
    for end in ("", "_low", "_high"):
        summary = summary.assign(**{f"variance{end}": np.exp(summary[f"log_variance{end}"])})
    with style.canvas(8.0, 4.2, 3) as (figure, panels):
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for name, group in summary.groupby("policy", sort=False):
                colour = style.POLICY_COLOURS[str(name)]
                style.band(axes, group, "level", column, colour, linewidth=2, label=name)
            axes.axhline(float(column == "variance"), color=style.VANILLA, linewidth=1.5, label="vanilla")
            axes.set(xlabel="noise level", title=title)
            style.log_ticks(axes, "x", [0.1, 0.25, 0.5, 1, 2, 4])
        panels[1].set_ylim(0, None)
        style.percent(panels[2].yaxis)
        ppo = summary[summary["policy"] == "PPO fixed point"]
        last = ppo.loc[ppo["level"].idxmax()]
        style.headline(
            figure,
            f"At KL = {target:g} nats and noise {last['level']:g}, PPO's fixed point beside vanilla: gain "
            f"{last['gain']:+.3f} [{last['gain_low']:+.3f}, {last['gain_high']:+.3f}], variance times "
            f"{last['variance']:.2f}, risk {100 * last['risk']:+.1f} points [{100 * last['risk_low']:+.1f}, "
            f"{100 * last['risk_high']:+.1f}]. Bands: 95%.",
        )
        style.legend_outside(figure, panels[0], 3)
    return figure
