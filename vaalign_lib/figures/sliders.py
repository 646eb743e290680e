"""Sliders for the notebooks. Run headless, each draws its defaults."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from vaalign_lib.figures import policies as policy_figures
from vaalign_lib.figures import robust, theory
from vaalign_lib.figures.style import AWARE, POLICY_COLOURS, REFERENCE, VANILLA, canvas
from vaalign_lib.jobs import headless
from vaalign_lib.papers.printed import printed_value
from vaalign_lib.statistics.returns import Returns, training_variance_ratio
from vaalign_lib.statistics.tests import proportion
from vaalign_lib.theory.bandit import FORMS, QUADRATIC, Bandit
from vaalign_lib.theory.simulations import draw_estimates, families, trust_region_pair


def _png(figure: Figure, **margins: float) -> bytes:
    """Return a figure as PNG, with fixed margins, which take half the time of measured ones."""
    figure.set_layout_engine(None)
    figure.subplots_adjust(**margins)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _explorer(
    images: Callable[[], list[bytes]],
    sliders: Mapping[str, widgets.ValueWidget],
    columns: Sequence[Sequence[str]],
) -> widgets.Widget | None:
    """Show sliders in columns above images, which are drawn again when one moves; headless once."""
    if headless():
        display(*(Image(image) for image in images()))
        return None
    pictures = [widgets.Image(value=image) for image in images()]

    def redraw(*_: object) -> None:
        for picture, image in zip(pictures, images(), strict=True):
            picture.value = image

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    boxes = [widgets.VBox([sliders[name] for name in column]) for column in columns]
    return widgets.VBox([widgets.HBox(boxes), *pictures])


# --- notebook 01: the bandit ----------------------------------------------------------------------------


def bandit_images(bandit: Bandit, draws: int, seed: int) -> list[bytes]:
    """Draw Figures 2 and 3 of one bandit from a seed; return both as PNG."""
    estimates = bandit.draw(np.random.default_rng(seed), draws)
    risks = (
        printed_value("figure3.vanilla.underperformance"),
        printed_value("figure3.variance_aware.underperformance"),
    )
    samples = {f"{draws:,} draws": bandit.returns(estimates)}
    figures = theory.bandit_arms(bandit, estimates), theory.bandit_returns(bandit, samples, risks, width=7.4)
    return [_png(one, left=0.09, right=0.98, bottom=0.14, top=0.8, wspace=0.25) for one in figures]


def bandit_explorer(bandit: Bandit, draws: int, seed: int) -> widgets.Widget | None:
    """Show sliders for the three true rewards, the deviations, the form and its strength.

    They start from the bandit; every redraw takes so many draws, from the same seed.

    Returns:
        The widget to display; None when run headless, after drawing the defaults.
    """
    sliders = _sliders(bandit)

    def relabel(*_: object) -> None:
        quadratic = sliders["form"].value in QUADRATIC
        sliders["vanilla"].description = "ε" if quadratic else "β, vanilla"
        sliders["aware"].layout.display = "none" if quadratic else ""

    sliders["form"].observe(relabel, names="value")
    relabel()
    arms = [[f"{kind} {k}" for k in (1, 2, 3)] for kind in ("reward", "deviation")]
    columns = [*arms, ["form", "vanilla", "aware"]]
    return _explorer(lambda: bandit_images(_bandit_of(sliders), draws, seed), sliders, columns)


def _sliders(bandit: Bandit) -> dict[str, widgets.ValueWidget]:
    settings = {"continuous_update": False}
    sliders: dict[str, widgets.ValueWidget] = {}
    for k, (reward, deviation) in enumerate(zip(bandit.true_rewards, bandit.deviations, strict=True), 1):
        sliders[f"reward {k}"] = widgets.FloatSlider(
            reward, min=-3, max=5, step=0.05, description=f"r*, arm {k}", **settings
        )
        sliders[f"deviation {k}"] = widgets.FloatSlider(
            deviation, min=0.05, max=30, step=0.05, description=f"σ, arm {k}", **settings
        )
    sliders["form"] = widgets.Dropdown(
        options=[(text, form) for form, text in FORMS.items()],
        value=bandit.form,
        description="form",
        layout=widgets.Layout(width="26em"),
    )
    for name, strength in (("vanilla", bandit.vanilla_strength), ("aware", bandit.variance_aware_strength)):
        sliders[name] = widgets.FloatLogSlider(
            strength, min=-2, max=1.5, step=0.05, description="β, aware", readout_format=".2f", **settings
        )
    return sliders


def _bandit_of(sliders: dict[str, widgets.ValueWidget]) -> Bandit:
    form = sliders["form"].value
    vanilla = sliders["vanilla"].value
    return Bandit(
        true_rewards=tuple(sliders[f"reward {k}"].value for k in (1, 2, 3)),
        deviations=tuple(sliders[f"deviation {k}"].value for k in (1, 2, 3)),
        form=form,
        vanilla_strength=vanilla,
        variance_aware_strength=vanilla if form in QUADRATIC else sliders["aware"].value,
    )


# --- notebook 02: the theorems --------------------------------------------------------------------------

TRUTH = np.array([1.0, 1.6, 1.9])  # r* of the three arms; the first one is the noisy one
ARMS = ("#525252", "#8a8a8a", "#bdbdbd")  # greys: colours are those of the policies
DRAWS = 400  # of the estimates, at every redraw
THEOREM_DEFAULTS = {"beta": 1.0, "epsilon": 0.1, "noise": 1.0, "ratio": 36.0}


def theorem_table(
    beta: float, epsilon: float, noise: float, ratio: float, seed: int = 0, draws: int = DRAWS
) -> pd.DataFrame:
    """Follow every policy over draws of three arms: its mean probabilities, mean gain, and risk.

    Args:
        beta: penalty of Theorem 2.7's forms.
        epsilon: radius of Equation (2); Equation (3)'s is lambda_min(Sigma) times it.
        noise: standard deviation of the quiet arms' estimates.
        ratio: variance of the first arm's over theirs.
        seed: of the draws.
        draws: their number.
    """
    variances, reference = noise**2 * np.array([ratio, 1.0, 1.0]), np.ones(3) / 3
    estimates = draw_estimates(TRUTH, variances, draws, np.random.default_rng(seed))  # (draws, arms)
    pair = trust_region_pair(estimates, variances, reference, epsilon, "simplex")
    policies = dict(zip(("Eq. (2), vanilla", "Eq. (3), variance-aware"), pair, strict=True))
    for name, policy_of in families(aversion=0.5).items():
        policies[name] = policy_of(estimates, variances, reference, beta)
    rows = []
    for name, policy in policies.items():
        gain = (policy - reference) @ TRUTH
        shares = {f"arm {k + 1}": share for k, share in enumerate(policy.mean(0))}
        rows.append({"policy": name} | shares | proportion(gain <= 0).columns("risk") | {"gain": gain.mean()})
    return pd.DataFrame(rows)


def theorem_figure(table: pd.DataFrame, draws: int = DRAWS) -> Figure:
    """Draw the policies of `theorem_table`: mean probabilities of the arms, and gain against risk."""
    table = table.iloc[::-1].reset_index(drop=True)
    with canvas(9.6, 3.6, 2, width_ratios=[1, 1.1]) as (figure, (left, right)):
        shares = table[["arm 1", "arm 2", "arm 3"]]
        starts = shares.cumsum(axis=1) - shares
        for arm, colour in zip(shares, ARMS, strict=True):
            left.barh(table["policy"], shares[arm], left=starts[arm], color=colour)
            middle = starts[arm].iloc[-1] + shares[arm].iloc[-1] / 2
            left.annotate(arm, (middle, len(table) - 0.5), ha="center", color=colour)
        left.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75], xlabel="mean probability (arm 1: noisy, poorest)")
        left.set_title("Where the mass goes", pad=16)
        left.grid(visible=False)
        errors = [table["risk"] - table["risk_low"], table["risk_high"] - table["risk"]]
        colours = [
            POLICY_COLOURS.get(name, VANILLA if "vanilla" in name else AWARE) for name in table["policy"]
        ]
        right.barh(table["policy"], table["risk"], xerr=errors, color=colours, ecolor=REFERENCE)
        for place, one in table.iterrows():
            right.annotate(f" gain {one['gain']:+.2f}", (one["risk_high"], place), va="center", fontsize=8.5)
        right.set(xlim=(0, 1), yticks=[], xlabel=f"risk of underperforming, {draws} draws, 95% interval")
        right.set_title("How often each ends below the reference", pad=16)
        right.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def theorem_images(draws: int = DRAWS, seed: int = 0, **strengths: float) -> list[bytes]:
    """Return `theorem_figure` at these strengths as PNG."""
    table = theorem_table(**strengths, seed=seed, draws=draws)
    return [_png(theorem_figure(table, draws), left=0.21, right=0.97, bottom=0.15, top=0.86, wspace=0.06)]


def theorem_explorer(seed: int = 0) -> widgets.Widget | None:
    """Show sliders on a log scale for beta, epsilon, the noise and the ratio of the arms' variances.

    Returns:
        The widget to display; None when run headless, after drawing the defaults.
    """
    ends = {"beta": (-2, 2), "epsilon": (-3, 0.5), "noise": (-1.5, 1), "ratio": (0, 3)}
    labels = {"beta": "β", "epsilon": "ε", "noise": "noise σ", "ratio": "σ₁² / σ₂²"}
    sliders = {
        name: widgets.FloatLogSlider(
            value,
            min=ends[name][0],
            max=ends[name][1],
            step=0.05,
            description=labels[name],
            readout_format=".3g",
            continuous_update=False,
        )
        for name, value in THEOREM_DEFAULTS.items()
    }

    def images() -> list[bytes]:
        return theorem_images(seed=seed, **{name: slider.value for name, slider in sliders.items()})

    return _explorer(images, sliders, [["beta", "epsilon"], ["noise", "ratio"]])


# --- policies -------------------------------------------------------------------------------------------

OUTCOMES = ("gold", "true_reward", "kl", "length")
RESAMPLES = 2000


def policy_figure(
    policies: pd.DataFrame, row: str, regime: str, protocol: str, outcome: str = "gold"
) -> Figure:
    """Draw one outcome of both methods' policies, with the ratio of its training variances.

    Args:
        policies: of `results.Results`, a row per policy.
        row: of Tables 1 to 3, `gpt2-ensemble`.
        regime: of the penalty.
        protocol: `shared` or `independent`.
        outcome: one of `OUTCOMES`; those without standard errors have no noise taken out.

    Raises:
        LookupError: there are no such policies of both methods.
    """
    stacks = _stacks(policies, row, regime, protocol)
    if any(one.empty for one in stacks.values()):
        raise LookupError(f"{row}, {protocol}, {regime}: no such policies of both methods among the results")
    vanilla, aware = (
        Returns(one[outcome].to_numpy(), one.get(f"{outcome}_error", 0 * one[outcome]).to_numpy())
        for one in (stacks["vanilla"], stacks["variance_aware"])
    )
    size = vanilla.values.size
    drawn = np.random.default_rng([0, 0]).integers(size, size=(RESAMPLES, size))
    ratio = training_variance_ratio([vanilla], [aware], [drawn])
    title, unit = f"{row}, {protocol} source, {_words(regime)}", policy_figures.LABELS[outcome]
    return policy_figures.return_distributions({title: stacks}, unit, {title: ratio}, outcome)


def _stacks(policies: pd.DataFrame, row: str, regime: str, protocol: str) -> dict[str, pd.DataFrame]:
    """Return the policies of a comparison by method; to match a KL only the variance-aware one changes."""
    plain = policies.query(
        "repeat == 0 and world == 0 and highest == 100 and widths == 'rescaled' and disagreement == 'none'"
    )
    mine = plain[plain["architecture"] + "-" + plain["source"] == row]
    before = "equal_mean_penalty" if regime == "matched_kl" else regime
    kinds = [
        ("vanilla", before, protocol),
        ("variance_aware", regime, protocol),
        ("reference", before, "shared"),
    ]
    return {
        method: mine.query("objective == @method and regime == @penalty and protocol == @kind").sort_values(
            "policy"
        )
        for method, penalty, kind in kinds
    }


def _words(name: str) -> str:
    return name.replace("_", " ").replace("kl", "KL")


def policy_image(policies: pd.DataFrame, **chosen: Any) -> bytes:
    """Return `policy_figure` as PNG; where there are no such policies it says so."""
    try:
        figure = policy_figure(policies, **chosen)
    except LookupError as error:
        figure = Figure(figsize=(3.9, 1))
        figure.text(0.5, 0.5, str(error.args[0]), ha="center", fontsize=8, wrap=True)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def policy_explorer(policies: pd.DataFrame) -> widgets.Widget | None:
    """Show a choice of row, penalty regime, protocol and outcome, and draw the policies of both methods.

    Args:
        policies: of `results.Results`, a row per policy.

    Returns:
        The widget to display; None when run headless, after drawing the first comparison.
    """
    aware = policies[policies["objective"] == "variance_aware"]
    options = {
        "row": list(dict.fromkeys(aware["architecture"] + "-" + aware["source"])),
        "regime": list(dict.fromkeys(aware["regime"])),
        "protocol": list(dict.fromkeys(aware["protocol"])),
        "outcome": [one for one in OUTCOMES if policies[one].notna().all()],
    }
    first = {name: values[0] for name, values in options.items()}
    if headless():
        display(Image(policy_image(policies, **first)))
        return None
    choices = {
        name: widgets.Dropdown(options=[(_words(one), one) for one in values], description=name)
        for name, values in options.items()
    }
    picture = widgets.Image(value=policy_image(policies, **first))

    def redraw(*_: object) -> None:
        picture.value = policy_image(policies, **{name: one.value for name, one in choices.items()})

    for one in choices.values():
        one.observe(redraw, names="value")
    return widgets.VBox([widgets.HBox(list(choices.values())), picture])


# --- ensembles ------------------------------------------------------------------------------------------

Calibrated = tuple[np.ndarray, pd.DataFrame, pd.DataFrame]  # variances (pairs,), bins, coverage


def ensemble_figure(measured: Calibrated, kind: str, members: int) -> Figure:
    """Draw an ensemble's variances, its errors beside its predicted deviations, and its coverage.

    Args:
        measured: of `experiments.reward_tables.members_calibration`.
        kind: of ensemble.
        members: of it that are asked.
    """
    variances, bins, covered = measured
    with canvas(9.6, 3.2, 3) as (figure, (spread, errors, holds)):
        seen = variances[variances > 0]
        spread.hist(seen, bins=np.geomspace(seen.min(), seen.max(), 31).tolist(), color=VANILLA, alpha=0.75)
        spread.axvline(np.median(seen), color="black", linewidth=1.2)
        spread.text(0.03, 0.95, f"median {np.median(seen):.2g}\nn = {seen.size}",
                    transform=spread.transAxes, va="top")  # fmt: skip
        spread.set(xscale="log", xlabel="variance of the difference, gold units", ylabel="pairs")
        spread.set_title(f"{kind}, {members} members")
        for repaired, colour, label in ((False, VANILLA, "as predicted"), (True, AWARE, "after one factor")):
            rows = bins[bins["repaired"] == repaired]
            ends = [rows["error"] - rows["low"], rows["high"] - rows["error"]]
            errors.errorbar(rows["predicted"], rows["error"], ends, fmt="o-", color=colour, label=label)
            rows = covered[covered["repaired"] == repaired]
            holds.plot(rows["nominal"], rows["actual"], "o-", color=colour, label=label)
            holds.fill_between(rows["nominal"], rows["low"], rows["high"], color=colour, alpha=0.2)
        limits = np.array([bins["predicted"].min(), bins["predicted"].max()])
        errors.plot(limits, limits, "--", color=REFERENCE, linewidth=0.8)
        errors.set(xscale="log", yscale="log", xlabel="predicted SD", ylabel="RMS error",
                   title="Errors against the true reward")  # fmt: skip
        for axis in (errors.xaxis, errors.yaxis, spread.xaxis):
            axis.set_minor_formatter(NullFormatter())
        holds.plot([0.4, 1], [0.4, 1], "--", color=REFERENCE, linewidth=0.8)
        inside = covered.loc[(covered["nominal"] == 0.95) & ~covered["repaired"], "actual"].item()
        holds.set(xlabel="nominal coverage", ylabel="actual coverage", ylim=(0, 1.02))
        holds.set_title(f"95% intervals hold {inside:.0%}")
        holds.legend(loc="lower right", fontsize=8)
    return figure


def ensemble_image(measure: Callable[[str, int], Calibrated], kind: str, members: int) -> bytes:
    """Draw the first members of a kind of ensemble as PNG; `measure` says what they are worth."""
    figure = ensemble_figure(measure(kind, members), kind, members)
    return _png(figure, left=0.07, right=0.99, bottom=0.17, top=0.9, wspace=0.28)


def ensemble_explorer(
    measure: Callable[[str, int], Calibrated], kinds: Sequence[str], members: int
) -> widgets.Widget | None:
    """Show a choice of the kind of ensemble and of how many members are asked, with spread and calibration.

    Returns:
        The widget to display; None when run headless, after drawing all members of the first kind.
    """
    kind = widgets.Dropdown(options=list(kinds), description="kind")
    asked = widgets.IntSlider(members, min=2, max=members, description="members", continuous_update=False)
    sliders = {"kind": kind, "members": asked}
    return _explorer(
        lambda: [ensemble_image(measure, kind.value, asked.value)], sliders, [["kind"], ["members"]]
    )


# --- notebook 07: the toy of reward-robust RLHF -----------------------------------------------------------


def toy_image(policies: Mapping[float, np.ndarray], rule: float, seed: int) -> bytes:
    """Draw the policies (seeds, prompts, responses) that a lambda has trained as PNG: the mean over seeds,
    one seed's, and what lambda 1, the nominal model alone, made of that seed.
    """
    shown = {
        f"mean, lambda {rule:g}": policies[rule].mean(0),
        f"seed {seed}, lambda {rule:g}": policies[rule][seed],
        f"seed {seed}, standard": policies[1.0][seed],
    }
    figure = robust.matrices(shown, "Probabilities of responses by prompt")
    return _png(figure, left=0.05, right=0.98, bottom=0.1, top=0.72, wspace=0.1)


def toy_explorer(policies: Mapping[float, np.ndarray]) -> widgets.Widget | None:
    """Show a choice of lambda and of the seed, and the toy's policies; headless, those of 0.4."""
    rules = sorted(policies)
    sliders = {
        "rule": widgets.SelectionSlider(options=rules, value=0.4, description="lambda"),
        "seed": widgets.IntSlider(0, min=0, max=len(policies[1.0]) - 1, description="seed"),
    }
    return _explorer(
        lambda: [toy_image(policies, sliders["rule"].value, sliders["seed"].value)],
        sliders,
        [["rule"], ["seed"]],
    )
